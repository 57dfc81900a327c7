"""A wrapper in other processes: after fork and spawn, in DataLoader workers, in shared memory, with two trainers."""

import json
import multiprocessing
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.matrix import matrix
from tests.test_training import make_images, make_reduced

NAMES = [("Neighbours", "Absorb"), ("Neighbours, ragged", "Prune"), ("InterImage", "all")]

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes as on Unix")


class Encoded(Dataset):
    """Images with what a wrapper says of them."""

    def __init__(self, fast):
        self.fast, self.images = fast, make_images(4)

    def __len__(self):
        return len(self.images)

    @torch.inference_mode()
    def __getitem__(self, index):
        torch.set_num_threads(1)
        return self.fast(self.images[index : index + 1])[0], int(
            self.fast.tokenize(self.images[index : index + 1]).counts
        )


@pytest.mark.parametrize(
    ("method", "strategy", "schedule"),
    matrix(
        [(method, *names) for method in ("fork", "spawn") for names in NAMES], *[("fork", *names) for names in NAMES]
    ),
)
def test_in_workers_of_a_data_loader(method, strategy, schedule):
    data = Encoded(make_reduced(strategy, schedule))
    answers, counts = next(iter(DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=method)))
    expected = [data[index] for index in range(4)]
    torch.testing.assert_close(answers, torch.stack([answer for answer, _ in expected]))
    assert counts.tolist() == [count for _, count in expected]


@pytest.mark.parametrize(("strategy", "schedule"), NAMES)
def test_after_fork_in_the_middle_of_its_use(strategy, schedule):
    fast, images = make_reduced(strategy, schedule), make_images()
    with torch.inference_mode():
        expected = fast(images)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child():
        with torch.inference_mode():
            sender.send(fast(images).tolist())

    process = context.Process(target=child)
    process.start()
    assert receiver.poll(60)
    assert torch.equal(torch.tensor(receiver.recv()), expected)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(("strategy", "schedule"), NAMES)
def test_shared_memory_is_seen_by_other_processes(strategy, schedule):
    fast, images = make_reduced(strategy, schedule), make_images()
    assert fast.share_memory() is fast
    assert all(tensor.is_shared() for tensor in (*fast.parameters(), *fast.buffers()))
    with torch.inference_mode():
        before = fast(images)

    def child():
        with torch.no_grad():
            fast.model.head.bias += 1

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    with torch.inference_mode():
        torch.testing.assert_close(fast(images), before + 1)


# Two processes, each with half of a batch; the gradient of rank 0 and that of one process on all are written.
TRAINERS = """
import json, os, sys
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tests.test_training import make_images, make_reduced

def loss(model, images, labels):
    return F.cross_entropy(model(images), labels)

def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

def train(rank, strategy, schedule, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    images, labels = make_images(4), torch.tensor([2, 0, 1, 3])
    fast = make_reduced(strategy, schedule).train()
    parallel = DistributedDataParallel(fast)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(parallel, images[2 * rank : 2 * rank + 2], labels[2 * rank : 2 * rank + 2]).backward()
        own = gradients(fast)
        optimizer.step()
    alone = make_reduced(strategy, schedule).train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        ((loss(alone, images[:2], labels[:2]) + loss(alone, images[2:], labels[2:])) / 2).backward()
        expected = gradients(alone)
        optimizer.step()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump([float((own - expected).abs().max()), float(expected.abs().max())], file)
    dist.destroy_process_group()

if __name__ == "__main__":
    import multiprocessing
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train, args=(rank, *sys.argv[1:])) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "schedule"), NAMES)
def test_two_trainers_have_the_gradient_of_one(tmp_path, strategy, schedule):
    command = [sys.executable, "-c", TRAINERS, strategy, schedule, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        error, largest = json.loads((tmp_path / f"{rank}.json").read_text())
        assert error < 1e-5 * max(1.0, largest)
        assert largest > 0
