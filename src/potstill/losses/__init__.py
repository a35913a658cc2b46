"""How far the student is from the teacher: one family a file, each loss unreduced, and the objective that sums them.

Bare functions for people with their own loop are exported here: :func:`temperature_scaled_softmax`,
:func:`distillation_loss` and :func:`feature_distillation_loss`.
"""

from potstill.losses.functional import distillation_loss as distillation_loss
from potstill.losses.functional import feature_distillation_loss as feature_distillation_loss
from potstill.losses.functional import temperature_scaled_softmax as temperature_scaled_softmax
