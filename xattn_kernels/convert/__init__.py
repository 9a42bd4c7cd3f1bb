"""Swap the attention blocks of an existing model for this library's, and back.

    report = convert_(model)      # in place; print(report) says what was swapped, what not and why
    revert_(model)                # the model's own blocks again

Known blocks are those of ATRC and SCA-MTL: the global-context attention block (`CrossAttention`),
the cross-task module of one scale that takes a dict with `features_<task>` (`CrossTaskAttention`)
and the head with cross-scale attention and aggregation (`CrossScaleHead`); besides, the residual
blocks around them (two 3x3 convolutions), whose batch norms are folded in inference. They are
recognised by the names and shapes of their parameters, whatever their class. A block is swapped if
all of this shows nothing that its replacement would not do:

- its Python code may depend on nothing but its input, tensors and settings (`code`);
- between its layers it may run the operators of a known block, with the same constants, and nothing
  else, not even what does nothing today (`operators`);
- it may not decide by the size of its input, except where a length is 1, which is tried
  (`sizes`);
- copies of it and of its replacement have to agree in outputs, gradients and running statistics,
  for features and parameters of all magnitudes and signs, in inference and in training
  (`trial`).

What cannot be shown to be equal is left, with the reason.

Instances are swapped; classes are left alone. A replacement holds the very layers of the block it
stands for (the same `nn.Conv2d` and batch norm objects), so parameters, their names and order in a
`state_dict`, optimisers, hooks on layers and settings of batch norms stay what they are.

A swapped block that is changed goes back to the model's own `forward`, with the layers and
attributes as they are then, until the change is undone. That covers layers that are dilated,
replaced or given a `forward` of their own, activations and dropout of the block, and its
attributes, set on the replacement, on its parts or on the model's own block. So networks can be
modified after `convert_` as before it. Activations and whatever else the replacement has no use for
are its attributes (`block.relu`), and no children of it: `named_modules` does not list them.
"""

from xattn_kernels.convert.plan import (
    KINDS,
    TOLERANCE,
    Conversion,
    ConversionReport,
    convert_,
    revert_,
)

__all__ = ["KINDS", "TOLERANCE", "Conversion", "ConversionReport", "convert_", "revert_"]
