"""Several Python threads at once, and processes forked from one that has computed: the same bits as one after
another."""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

import pytest
import torch

from combinations import THOROUGH
from hardening_jobs import jobs, run_quietly, same
from variant_runs import run_script


def test_several_threads_give_the_bits_of_one() -> None:
    every = jobs()
    want = {name: run_quietly(job) for name, job in every.items()}
    together, wrong, raised = threading.Barrier(4, timeout=60), [], []

    def work(number: int) -> None:
        names = [*every] * (20 if THOROUGH else 2)
        random.Random(number).shuffle(names)  # every thread in another order, so that different calls overlap
        together.wait()
        try:
            wrong.extend(name for name in names if not same(run_quietly(every[name]), want[name]))
        except BaseException as error:
            raised.append(error)

    state = torch.get_rng_state()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join(200)
    finally:
        sys.setswitchinterval(before)
    assert not any(t.is_alive() for t in threads)
    assert not raised and not wrong
    assert torch.equal(torch.get_rng_state(), state)


# A process of its own: pytest's has threads, and a fork of it would say nothing about a user's.
FORK = """
import multiprocessing, signal, torch
signal.alarm(200)  # a child that waits for threads of its parent waits for ever
from hardening_jobs import jobs, run_quietly, same
torch.set_num_threads({threads})
every = jobs()
want = {{name: run_quietly(job) for name, job in every.items()}}
torch.set_num_threads(1)  # torch's own layers may give other bits then
alone = {{name: run_quietly(job) for name, job in every.items()}}
torch.set_num_threads({threads})
x = torch.rand(64, 3, 64, 64)
import fastrobust as fr
large = fr.ops.pgd_step(x, x, x - 0.5, 0.1, 0.3)  # enough for several threads

def child(queue):
    signal.alarm(100)
    torch.set_num_threads(1)  # as torch.utils.data does in its workers
    queue.put([name for name, job in every.items() if not same(run_quietly(job), alone[name])])
    queue.put(torch.equal(fr.ops.pgd_step(x, x, x - 0.5, 0.1, 0.3), large))

context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
print("forked", queue.get(timeout=100) == [], queue.get(timeout=100))
process.join(30)
print(process.exitcode)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):  # augmentation by number, and what is computed once for each example
        image = x[index : index + 1]
        moved = fr.ops.shift_flip(image, torch.tensor([[index % 3, -1]]), torch.tensor([index % 2 == 0]))
        bounds = every["ibp"]() if index == 0 else every["distance"]()
        return fr.ops.random_start(moved, 0.1, seed=index)[0], bounds[0]

loaded = [item for batch in torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2) for item in batch]
here = [item for index in range(12) for item in Data()[index]]
print("loaded", len(loaded), all(map(torch.equal, loaded, here)))
print("parent", all(same(run_quietly(job), want[name]) for name, job in every.items()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_forked_processes_and_workers_of_loaders(threads: int) -> None:
    folder = str(Path(__file__).parents[1])
    script = f"import sys; sys.path.insert(0, {folder!r})\n" + FORK.format(threads=threads)
    done = run_script(script, {**os.environ, "OMP_NUM_THREADS": str(threads)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["forked", "True", "True", "0", "loaded", "24", "True", "parent", "True"]
