"""The numeric core that many losses share: streamed log-sum-exp, token log-probabilities, gather with gradients."""

from lossbook.ops.distributed import gather, local_rows
from lossbook.ops.streamed import streamed_logsumexp, token_logprobs

__all__ = ["gather", "local_rows", "streamed_logsumexp", "token_logprobs"]
