import pytest
import torch
from fastgrpo_profiling import SpanRecorder, record, span
from fastgrpo_profiling.watch import watch_forward, watch_optimizer
from torch import nn


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("as asked")


def test_forward_calls_are_spans_named_by_what_they_are_given():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with record() as recorder, watch_forward(model, lambda m, args, kwargs: "big" if len(args[0]) > 1 else None):
        with watch_forward(model[0], "first"):
            model(torch.ones(3, 2))
            model(torch.ones(1, 2))
        model(torch.ones(3, 2))
    model(torch.ones(3, 2))
    assert {name: total.count for name, total in recorder.totals.items()} == {"big": 2, "first": 2}


def test_a_forward_call_that_raises_closes_its_span():
    model = nn.Sequential(nn.Linear(2, 2), Failing())
    with record(SpanRecorder(trace=True)) as recorder, watch_forward(model, "model"), watch_forward(model[1], "part"):
        with pytest.raises(RuntimeError, match="as asked"):
            model(torch.ones(1, 2))
        with span("after"):
            pass
    assert [(e.name, e.depth) for e in recorder.events] == [("part", 1), ("model", 0), ("after", 0)]


def test_optimizer_steps_are_spans():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    watch_optimizer(optimizer, "update/optimizer")
    weight.grad = torch.ones(2)
    with record() as recorder:
        optimizer.step()
        optimizer.step()
    assert recorder.totals["update/optimizer"].count == 2
    assert weight.tolist() == [0, 0]
