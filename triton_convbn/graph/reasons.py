"""The reasons why a BatchNorm is not folded."""

import enum


class Reason(enum.Enum):
    """Why a BatchNorm is not folded. The value is its name in counters and tables. `text` is the reason in words."""

    TRAINING = "training"
    NO_RUNNING_STATS = "no_running_stats"
    INPUT_NOT_CONV = "input_not_conv"
    CONCATENATION = "concatenation"
    CHANNELS_MOVED = "channels_moved"
    PADDED = "padded"
    CONV_SHARED = "conv_shared"
    STATISTICS_USED = "statistics_used"
    ALREADY_FOLDED = "already_folded"
    LINEAR_RANK = "linear_rank"
    UNBATCHED = "unbatched"
    UNKNOWN_SHAPE = "unknown_shape"
    NOT_PER_CHANNEL = "not_per_channel"
    PRODUCT_USED = "product_used"
    CHANNELS = "channels"
    DTYPE = "dtype"
    DEVICE = "device"
    TENSOR_SUBCLASS = "tensor_subclass"
    MUTATED = "mutated"
    OPAQUE_BETWEEN = "opaque_between"
    VIEW_OR_COPY = "view_or_copy"
    HOOKS = "hooks"
    PARAMETRIZED = "parametrized"
    CUSTOM_FORWARD = "custom_forward"
    DYNAMIC_ARGUMENT = "dynamic_argument"
    UNREADABLE_CALL = "unreadable_call"
    PADS_ZEROS = "pads_zeros"
    OUTPUT_SHARED = "output_shared"
    TRANSPOSED = "transposed"
    CANCELS = "cancels"
    DOES_NOT_PAY = "does_not_pay"
    NOT_REACHED = "not_reached"
    NOT_CONSTANT = "not_constant"
    NESTED_GRAPH = "nested_graph"
    OTHER_INPUT = "other_input"
    OTHER_GRID = "other_grid"
    OTHER_GROUPS = "other_groups"
    KERNEL_GROWS = "kernel_grows"
    BRANCH_SHARED = "branch_shared"
    BROADCAST = "broadcast"
    ALPHA = "alpha"

    @property
    def text(self) -> str:
        return _TEXTS[self]


_TEXTS = {
    Reason.TRAINING: "it is in training mode and normalizes with the batch's statistics (see freeze_statistics)",
    Reason.NO_RUNNING_STATS: "it keeps no running statistics (track_running_stats=False)",
    Reason.INPUT_NOT_CONV: "its input is not the output of a convolution or Linear in the same graph",
    Reason.CONCATENATION: "not everything in the concatenation before it is the output of a convolution or Linear",
    Reason.CHANNELS_MOVED: "a call between it and a convolution moves the channels off dim 1, or keeps only some",
    Reason.PADDED: "a constant is padded between the two; it scales and shifts the padding, and a fold does not",
    Reason.CONV_SHARED: "the convolution's output is also used elsewhere",
    Reason.STATISTICS_USED: "the statistics that it returns are used",
    Reason.ALREADY_FOLDED: "the convolution before or after it already carries another BatchNorm",
    Reason.LINEAR_RANK: "the Linear's output is not 2-D: the BatchNorm acts on dim 1, the Linear on the last",
    Reason.UNBATCHED: "the convolution's input is unbatched: the BatchNorm's dim 1 is not the channels",
    Reason.UNKNOWN_SHAPE: "the graph has no shape of the input, or no example of a tensor that the fold reads",
    Reason.NOT_PER_CHANNEL: "its arithmetic is not one scale and one shift a channel, along dim 1",
    Reason.PRODUCT_USED: "the product in the middle of its arithmetic is also used elsewhere",
    Reason.CHANNELS: "the convolution and the BatchNorm have different numbers of channels",
    Reason.DTYPE: "the dtypes of the layer, its input and the BatchNorm do not fold",
    Reason.DEVICE: "the tensors are on different devices",
    Reason.TENSOR_SUBCLASS: "a parameter or activation is a tensor subclass, which need not compute as a tensor does",
    Reason.MUTATED: "a tensor that the fold reads is written to between the two, or before backward reads it",
    Reason.OPAQUE_BETWEEN: "a call with unknown effects is between the two",
    Reason.VIEW_OR_COPY: "its strides decide whether a later call copies, and the value or the copy is written to",
    Reason.HOOKS: "the module carries hooks, which a fold would skip",
    Reason.PARAMETRIZED: "the module computes its weight (torch.nn.utils.parametrize)",
    Reason.CUSTOM_FORWARD: "the module has a forward of its own",
    Reason.DYNAMIC_ARGUMENT: "an argument that has to be a constant is computed in the graph",
    Reason.UNREADABLE_CALL: "the arguments of the call do not fit its signature",
    Reason.PADS_ZEROS: "the convolution after it pads with zeros, which the BatchNorm does not scale and shift",
    Reason.OUTPUT_SHARED: "its output is read by a convolution and also used elsewhere",
    Reason.TRANSPOSED: "the convolution after it is transposed: at the border its sums have fewer terms",
    Reason.CANCELS: "its input's mean is many standard deviations, which a fold would subtract after rounding",
    Reason.DOES_NOT_PAY: 'a fold gains nothing over Inductor\'s own code here (when="always" folds it)',
    Reason.NOT_REACHED: "no captured graph calls it",
    Reason.NOT_CONSTANT: "a tensor that the fold reads is not a constant of the exported program",
    Reason.NESTED_GRAPH: "it is in a graph inside the program's (no_grad and autocast: run_decompositions() first)",
    Reason.OTHER_INPUT: "the terms of the sum do not all read one tensor",
    Reason.OTHER_GRID: "the convolutions of the sum have other strides or dilations, or read other positions",
    Reason.OTHER_GROUPS: "the convolutions of the sum have other groups",
    Reason.KERNEL_GROWS: "no kernel of the sum holds all the others",
    Reason.BRANCH_SHARED: "a term of the sum is also used elsewhere",
    Reason.BROADCAST: "the terms of the sum have different shapes",
    Reason.ALPHA: "the sum multiplies a term by alpha",
}
