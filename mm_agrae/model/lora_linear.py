"""A linear layer with its LoRA adapter as one operation.

    y = W x + b + s · B (A x)

PEFT's form is a dozen operations a layer, most of them elementwise on the layer's output, and twice that in Python:
on a GPU the CPU then takes longer to start them than they run. Here the adapter's product is added inside the matrix
product's kernel, and the backward pass is four products by hand. Same parameters, same names on disk. What PEFT alone
can do (dropout, several adapters, merged weights, DoRA and other variants) goes through PEFT.

Shapes: N positions, I inputs, O outputs, R rank.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_agrae.model.vocab_head import compute_dtype, wide_matmul


def install(model: Any) -> None:
    """Apply to the LoRA layers of a PEFT model whose base is a frozen linear layer."""
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        # PEFT casts each adapter's input to float32, and autocast casts it back: the same numbers, and a copy less.
        module.cast_input_dtype_enabled = False
        if type(module.get_base_layer()) is nn.Linear:
            module.forward = types.MethodType(_forward, module)


def _forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    base, names = self.get_base_layer(), self.active_adapters
    name = names[0] if len(names) == 1 else None
    if (
        name not in self.lora_A
        or args
        or options
        or self.disable_adapters
        or self.merged
        or name in self.lora_variant
        or self.lora_bias.get(name)
        or base.weight.requires_grad
        or (self.training and getattr(self.lora_dropout[name], "p", 0) > 0)
    ):
        return type(self).forward(self, x, *args, **options)
    dtype = compute_dtype(x)
    return _Adapted.apply(
        x.to(dtype), base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    )


class _Adapted(torch.autograd.Function):
    # No autocast contexts: all operands of a product have one precision already.
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scale: float
    ) -> Tensor:
        dtype = x.dtype
        ctx.dtypes, ctx.scale = (down_RI.dtype, up_OR.dtype), scale
        # The frozen weight is kept without the saved-tensor hooks, which cost time for each tensor.
        ctx.weight_OI = weight_OI = weight_OI.to(dtype)
        down_RI, up_OR = down_RI.to(dtype), up_OR.to(dtype)
        out = F.linear(x, weight_OI, None if bias_O is None else bias_O.to(dtype))
        low = F.linear(x, down_RI)
        out.view(-1, out.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up_OR.T, alpha=scale)
        ctx.save_for_backward(x, down_RI, up_OR, low)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down_RI, up_OR, low = ctx.saved_tensors
        grad_NO, x_NI, low_NR = (each.reshape(-1, each.shape[-1]) for each in (grad, x, low))
        grad_NR = torch.mm(grad_NO, up_OR).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_NO, ctx.weight_OI).addmm_(grad_NR, down_RI).view(x.shape)
        grad_down = wide_matmul(grad_NR.T, x_NI).to(ctx.dtypes[0])
        grad_up = wide_matmul(grad_NO.T, low_NR).mul_(ctx.scale).to(ctx.dtypes[1])
        return grad_x, None, None, grad_down, grad_up, None
