import torch

from vwt.measure.environment import cpu_model, hardware


def test_cpu_model(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Processor: 3\nmodel name\t: Another\n")
    assert cpu_model(info) == "A Processor: 3"
    assert cpu_model(tmp_path / "missing")


def test_hardware_line():
    line = hardware(torch.device("cpu"), "bfloat16")
    assert cpu_model() in line
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in line
    assert line.endswith("bfloat16")
