"""`python -m tests.recurrence.compiled`: the chunked scan under torch.compile, both ways, one graph for all lengths."""

from __future__ import annotations

import torch

from gatedlens.recurrence.chunks import chunked
from gatedlens.recurrence.terms import Terms


def given(length: int, by_key: bool, delta: bool) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    probe = random(2, length, 4, 6) if delta else None
    log = random(2, length, 4, 6 if by_key else 1)
    return [random(2, length, 4, 5), log, random(2, length, 4, 6), random(2, length, 4, 6), probe, random(2, 4, 5, 6)]


def run(u, log, key, read, probe, state):  # type: ignore[no-untyped-def]
    key = 0.3 * key
    terms = Terms(-log.square(), key, read, erase=None if probe is None else key, probe=probe)
    return chunked(terms, u, state, chunk=8)[0]


def main() -> None:
    torch.set_num_threads(1)
    for name, by_key, delta in (("head", False, False), ("key", True, False), ("delta", False, True)):
        torch._dynamo.reset()
        step = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
        for length in (9, 21):
            live = given(length, by_key, delta)
            wanted = [x for x in live if x is not None]
            got, want = step(*live), run(*live)
            assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
            ours, theirs = (torch.autograd.grad(x.square().sum(), wanted) for x in (got, want))
            for a, b in zip(ours, theirs, strict=True):
                assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
        print(name)


if __name__ == "__main__":
    main()
