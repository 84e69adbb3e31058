"""The numeric core that many losses share: streamed log-sum-exp, token log-probabilities, top-k, gather with gradients."""

from lossbook.ops.distributed import gather, local_rows
from lossbook.ops.streamed import sequence_logprobs, streamed_logsumexp, token_logprobs
from lossbook.ops.topk import streamed_topk

__all__ = ["gather", "local_rows", "sequence_logprobs", "streamed_logsumexp", "streamed_topk", "token_logprobs"]
