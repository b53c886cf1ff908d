"""Values that several modules know by name: terms of the loss, prediction types, weightings."""

TERMS = ("image", "hidden", "clean", "text")  # of the loss; each needs one output of the model
PREDICTS = ("eps", "v", "x0")  # `model.predicts`
WEIGHTINGS = ("output", "v")  # `loss.weighting`
