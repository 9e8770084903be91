"""Several threads at once: each gets what it would get alone, and nothing is lost."""

import logging
import os
import sys
import threading

import pytest
import torch
from networks import rand, settled
from torch import nn

import rabbet
from rabbet.data.task import evaluating
from rabbet.methods import QUALITY


def _together(*calls):
    """What each call gives, all at once in threads of their own."""
    answers = [None] * len(calls)

    def answer(k):
        try:
            answers[k] = calls[k]()
        except Exception as e:
            answers[k] = e

    threads = [threading.Thread(target=answer, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _net():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return settled(net.append(nn.Linear(8, 4))).train()


def _written(result, path):
    result.save(path)
    return path.read_bytes()


@pytest.fixture
def threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
def test_two_threads_compress_one_network_as_each_would_alone(threads, tmp_path):
    net, x, budgets = _net(), [rand(8, 3, 8, 8)], ("bits <= 3", "bits <= 5")
    descriptor, stream = os.fstat(1), sys.stdout

    def work(budget):
        return lambda: rabbet.compress(net, budget, x, QUALITY["fast"])

    alone = [_written(work(b)(), tmp_path / "a.safetensors") for b in budgets]
    answers = _together(*map(work, budgets), *map(work, budgets))
    assert [_written(r, tmp_path / "a.safetensors") for r in answers] == alone * 2
    assert all(m.training for m in net.modules())
    assert os.path.samestat(os.fstat(1), descriptor)
    assert sys.stdout is stream
    assert torch.get_num_threads() == 2


def test_while_one_thread_surveys_another_sees_the_network_as_it_is():
    net, seen = _net(), []

    def forward(model, batch):
        seen.append(([m.training for m in net.modules()], any(m._forward_hooks for m in net)))
        return model(batch)

    rabbet.survey(net, rabbet.Task([rand(8, 3, 8, 8)], forward=forward))
    assert seen
    assert all(entry == ([True] * 7, False) for entry in seen)


def test_whichever_thread_is_the_last_to_leave_puts_the_modes_back():
    net = _net()
    first, second = evaluating(net), evaluating(net)
    for way in (first, second):
        way.__enter__()
    first.__exit__(None, None, None)
    assert not any(m.training for m in net.modules())
    second.__exit__(None, None, None)
    assert all(m.training for m in net.modules())


def test_nothing_is_swallowed_of_what_others_print_and_log_during_an_export(
    tmp_path, capsys, caplog
):
    pytest.importorskip("onnxscript")
    result = rabbet.fit(_net(), "0 dense@8c | act@8", [rand(8, 3, 8, 8)], QUALITY["fast"])
    forward = result.model.forward

    def talks(x):
        print("printed")
        logging.getLogger("of the user").warning("logged")
        return forward(x)

    result.model.forward = talks
    result.export(tmp_path / "a.pt2")
    assert "printed" in capsys.readouterr().out
    assert "logged" in caplog.text
