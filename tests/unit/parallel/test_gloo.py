"""Real processes over torch.distributed's gloo: the four families of the acceptance, 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ferrum_ref.parallel_run import Job, run_jobs

FAMILIES = ("llama", "qwen3", "mixtral", "gemma 3")
NUM_NEW = 6
TIMEOUT_S = 120.0


@pytest.mark.clause("TP-PIPE-1", "TP-PIPE-4", "TP-RUN-5", "TP-RUN-6", "TP-GLOO-1", "TP-GLOO-2")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_processes_give_the_logits_of_the_undivided_model(
    num_ranks: int,
    family_model: Callable[[str], Any],
    sharded_logits: Callable[..., Any],
    single_logits: Callable[..., Any],
) -> None:
    models = [family_model(name) for name in FAMILIES]
    jobs = [Job(str(tiny.path), tiny.ids, NUM_NEW) for tiny in models]
    in_stages = [Job(job.model, job.token_ids, NUM_NEW, num_shards=num_ranks // 2) for job in jobs[:2]]
    ranks = run_jobs([*jobs, *in_stages], num_ranks, timeout_s=TIMEOUT_S)
    for index, tiny in enumerate(models):
        found = [results[index] for results in ranks]
        assert all(np.array_equal(each.logits, found[0].logits) for each in found)
        assert all(each.tokens == found[0].tokens for each in found)
        assert np.abs(found[0].logits - tiny.exact).max() <= tiny.bound
        single = single_logits(tiny.path, tiny.ids, whole=True)
        assert np.abs(found[0].logits - single).max() <= 2 * tiny.bound
        in_threads = sharded_logits(tiny.path, num_ranks, tiny.ids, whole=True)[0]
        assert np.array_equal(found[0].logits, in_threads), "the transport does not matter, to the last bit"
    for index, tiny in enumerate(models[:2]):
        staged = [results[len(models) + index] for results in ranks]
        if num_ranks == 2:
            expected = single_logits(tiny.path, tiny.ids, whole=True)
        else:
            expected = sharded_logits(tiny.path, 2, tiny.ids, whole=True)[0]
        assert all(np.array_equal(each.logits, expected) for each in staged), "stages change no bit"
        assert all(each.tokens == ranks[0][index].tokens for each in staged)
