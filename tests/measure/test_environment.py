import torch

from vwt.measure.environment import cpu_model, describe_machine, hardware, other_threads


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


def test_a_machine_as_it_is_stored():
    machine = describe_machine(torch.device("cpu"))
    assert machine["device"] == "cpu"
    assert machine["threads"] == torch.get_num_threads()
    assert other_threads(machine) == ""
    assert other_threads({**machine, "threads": 999}).startswith("999 threads, here torch has ")
    assert other_threads({**machine, "threads": 999, "device": "a GPU"}) == ""
