"""Values that several modules know by name: terms of the loss, prediction types, weightings."""

LOSS_TERMS = ("image", "hidden", "clean", "text")  # of the loss; each needs one output of the model
PREDICTION_TYPES = ("eps", "v", "x0")  # `model.prediction_type`
LOSS_WEIGHTINGS = ("output", "v")  # `loss.weighting`
