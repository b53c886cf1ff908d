"""Names that several modules share: terms of the loss, prediction types, weightings of the loss.

`config.table` lists them as values of fields. Add a term of the loss here and in `diffusion.losses`.
"""

LOSS_TERMS = ("image", "hidden", "clean", "text")  # weights in `config.loss`; each term needs one output of the model
PREDICTION_TYPES = ("eps", "v", "x0")  # `model.prediction_type`
LOSS_WEIGHTINGS = ("output", "v")  # `loss.weighting`
