"""Two gloo processes against one."""

import pytest
import torch
from two_processes import in_two_processes

from lossbook.ops import gather, local_rows
from lossbook.similarity.groco import groco_multi_view_loss
from lossbook.similarity.temperature import info_nce_loss, nt_xent_loss

BATCH, DIM = 6, 5


def batch():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2 * BATCH, DIM, generator=generator, dtype=torch.float64) for _ in range(2)]


LOSSES = {
    "info_nce": lambda q, k, d: info_nce_loss(q, k, temperature=0.3, distributed=d),
    "symmetric": lambda q, k, d: info_nce_loss(q, k, temperature=0.3, symmetric=True, distributed=d),
    "nt_xent": lambda q, k, d: nt_xent_loss(q, k, temperature=0.3, distributed=d),
    "groco": lambda q, k, d: groco_multi_view_loss(
        torch.stack([q, k]), num_negatives=3, stop_gradient=False, distributed=d
    ),
}


def of_one_process(rank):
    out = {}
    for name, loss in LOSSES.items():
        q, k = (x[rank * BATCH : (rank + 1) * BATCH].clone().requires_grad_() for x in batch())
        value = loss(q, k, True)
        value.backward()
        out[name] = value.item(), q.grad, k.grad
    out["gathered"] = gather(torch.full((2, 1), rank)), local_rows(2)
    try:
        gather(torch.zeros(rank + 1))
    except ValueError as error:
        out["error"] = str(error)
    return out


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return in_two_processes(of_one_process, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_match_one(two_processes, name):
    q, k = (x.requires_grad_() for x in batch())
    loss = LOSSES[name](q, k, False)
    loss.backward()
    values, grads_q, grads_k = zip(*(out[name] for out in two_processes), strict=True)
    # Processes average losses and gradients, so each process's gradient counts half.
    torch.testing.assert_close(sum(values) / 2, loss.item(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(grads_q) / 2, q.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(grads_k) / 2, k.grad, rtol=1e-6, atol=1e-6)


def test_gather_keeps_the_order_of_ranks(two_processes):
    for rank, out in enumerate(two_processes):
        gathered, rows = out["gathered"]
        assert gathered.flatten().tolist() == [0, 0, 1, 1]
        assert (gathered[rows] == rank).all()


def test_different_shapes_are_refused(two_processes):
    assert all("tensor must have one shape" in out["error"] for out in two_processes)


def test_one_process_is_the_identity():
    x = torch.ones(3, 2)
    assert gather(x) is x
    assert local_rows(3).tolist() == [0, 1, 2]
