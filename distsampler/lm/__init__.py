"""Language models: the losses of their tokens, and texts as data.

``losses``     the loss of each token, and the mean over each sequence
``sequences``  texts or token ids as rows of one length
"""

from distsampler.lm.losses import sequence_losses, token_losses
from distsampler.lm.sequences import blocks

__all__ = ["blocks", "sequence_losses", "token_losses"]
