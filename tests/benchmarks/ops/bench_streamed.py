"""The streamed core against the dense computation: InfoNCE over a batch, token log-probabilities over a vocabulary."""

import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed

from lossbook.ops import token_logprobs
from lossbook.similarity.temperature import info_nce_loss

DIM = 128


def _pairs(batch):
    return [torch.randn(batch, DIM, requires_grad=True) for _ in range(2)]


def _streamed(q, k):
    q.grad = k.grad = None
    loss = info_nce_loss(q, k, temperature=0.1)
    loss.backward()
    return loss.detach()


def _dense(q, k):
    q.grad = k.grad = None
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.1
    loss = F.cross_entropy(logits, torch.arange(len(q)))
    loss.backward()
    return loss.detach()


def _time(batch, repeats):
    q, k = _pairs(batch)
    torch.testing.assert_close(_streamed(q, k), _dense(q, k), rtol=1e-5, atol=1e-5)
    return timed(lambda: _streamed(q, k), lambda: _dense(q, k), repeats=repeats)


def _time_alone(batch, repeats):
    q, k = _pairs(batch)
    return timed(lambda: _streamed(q, k), repeats=repeats)[0]


def _memory(batch, step):
    q, k = _pairs(batch)
    step(*_pairs(8))  # what the first call of each kernel allocates for good
    return peak_memory(lambda: step(q, k))


def _vocabulary(tokens, words, dim):
    hidden, weight = torch.randn(tokens, dim), torch.randn(words, dim) / dim**0.5
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(words, (tokens,))


def _token_streamed(hidden, weight, targets):
    hidden.grad = weight.grad = None
    loss = -token_logprobs(hidden, weight, targets).mean()
    loss.backward()
    return loss.detach()


def _token_dense(hidden, weight, targets):
    hidden.grad = weight.grad = None
    loss = F.cross_entropy(hidden @ weight.T, targets)
    loss.backward()
    return loss.detach()


def _token_time(*shape):
    inputs = _vocabulary(*shape)
    torch.testing.assert_close(_token_streamed(*inputs), _token_dense(*inputs), rtol=1e-5, atol=1e-5)
    return timed(lambda: _token_streamed(*inputs), lambda: _token_dense(*inputs), repeats=2)


def _token_time_alone(*shape):
    inputs = _vocabulary(*shape)
    return timed(lambda: _token_streamed(*inputs), repeats=3)[0]


def _token_memory(step, *shape):
    inputs = _vocabulary(*shape)
    step(*_vocabulary(8, 16, 4))
    return peak_memory(lambda: step(*inputs))


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug = "ops", "streamed_logsumexp"
    rows = []
    for batch in (128, 512, 2048, 4096):
        ours, dense = in_fresh_process(_time, batch, 20 if batch <= 2048 else 5)
        memory = [in_fresh_process(_memory, batch, step) for step in (_streamed, _dense)]
        note = bar(ours / dense, 1.3, "ratio") if batch == 2048 else ""
        rows.append(
            Row(part, slug, "InfoNCE", "dense cross-entropy", f"B = {batch}", ours, dense, ours / dense, *memory, note)
        )
    large = 16_384
    memory = in_fresh_process(_memory, large, _streamed)
    note = bar(memory / 1024, 1.5, "memory in GB")
    rows.append(
        Row(
            part,
            slug,
            "InfoNCE",
            "",
            f"B = {large}",
            in_fresh_process(_time_alone, large, 2),
            memory_mb=memory,
            note=note,
        )
    )

    shape = (4096, 50_257, 512)
    ours, dense = in_fresh_process(_token_time, *shape)
    memory = [in_fresh_process(_token_memory, step, *shape) for step in (_token_streamed, _token_dense)]
    note = bar(ours / dense, 1.4, "ratio") + "; " + bar(memory[0] / memory[1], 0.25, "share of the dense memory")
    size = "{} tokens × {} words × {}".format(*shape)
    rows.append(
        Row(
            part,
            "token_logprobs",
            "log-probability",
            "dense cross-entropy",
            size,
            ours,
            dense,
            ours / dense,
            *memory,
            note,
        )
    )

    batches = [2048, 4096, 8192, 16_384]
    times = [in_fresh_process(_time_alone, batch, 3) for batch in batches]
    memories = [in_fresh_process(_memory, batch, _streamed) for batch in batches]
    span = f"B = {batches[0]} to {batches[-1]}"
    slopes = [
        Slope("streamed InfoNCE", "time", span, exponent(batches, times), "2: every pair is looked at"),
        Slope("streamed InfoNCE", "memory", span, exponent(batches, memories), "at most 1: no B × B matrix"),
    ]
    tokens, words, dim = [1024, 2048, 4096, 8192], 20_000, 256
    times = [in_fresh_process(_token_time_alone, count, words, dim) for count in tokens]
    memories = [in_fresh_process(_token_memory, _token_streamed, count, words, dim) for count in tokens]
    span = f"{tokens[0]} to {tokens[-1]} tokens × {words} words × {dim}"
    slopes += [
        Slope("token log-probabilities", "time", span, exponent(tokens, times), "1: each token meets each word"),
        Slope("token log-probabilities", "memory", span, exponent(tokens, memories), "at most 1: no matrix of them"),
    ]
    return rows, slopes
