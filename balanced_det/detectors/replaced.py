"""Arguments of Detectron2's constructors, and keys, that the criterion takes the place of."""

from ..errors import InputError

# {name: Detectron2's default}.
DENSE = {"focal_loss_alpha": 0.25, "focal_loss_gamma": 2.0}
REGRESSION = {"smooth_l1_beta": 0.0, "box_reg_loss_type": "smooth_l1"}
REGIONS = {**REGRESSION, "loss_weight": 1.0, "use_sigmoid_ce": False, "use_fed_loss": False}

# {Detectron2's key: (its default, the key to use instead)}.
RPN_KEYS = {
    "MODEL.RPN.SMOOTH_L1_BETA": (0.0, "BALANCE.SmoothL1Loss.BETA"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1", "BALANCE.RPN.BOX_LOSS"),
}


def refuse_replaced(arguments: dict, replaced: dict) -> None:
    """Refuse an argument that would be ignored, unless it is Detectron2's default.

    Args:
        arguments: of a constructor, by name.
        replaced: {name: default} of those that the criterion decides.
    """
    for name, default in replaced.items():
        if arguments.get(name, default) != default:
            raise InputError(
                f"{name} is {arguments[name]!r}, but the criterion decides the losses here: give "
                "it to the loss, or to Criterion, instead."
            )


def without(arguments: dict, replaced: dict) -> dict:
    """Return the arguments that a config was translated to, without those that are replaced."""
    return {name: value for name, value in arguments.items() if name not in replaced}
