"""What makes results repeatable on this machine, set and measured at start.

Batch invariance rests on one fact about the BLAS: from 16 rows up, a row of a product does not depend on how many
other rows there are. `rows_are_invariant` measures it for the shapes of a base. Nothing here knows training.
"""

# Shape suffix legend
#   M = rows, I = in features, O = out features

from __future__ import annotations

import torch
import torch.nn.functional as F

from treadle_engine.base_model import ROW_MULTIPLE, BaseModel

_PROBE_ROWS = (16, 32, 48, 80, 112, 256)


def settle(num_threads: int | None = None) -> None:
    """Fix the number of threads and forbid reduced-precision shortcuts; call once, before a base is loaded."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def rows_are_invariant(base: BaseModel) -> bool:
    """Tell whether this machine's products, forward and backward, are the same rows alone and in company."""
    generator = torch.Generator().manual_seed(0)
    most = _PROBE_ROWS[-1]
    shapes = {(linear.in_features, linear.out_features): linear for linear in base.linears}
    for linear in shapes.values():
        x_MI = torch.randn(most, linear.in_features, generator=generator).to(base.device, base.dtype)
        g_MO = torch.randn(most, linear.out_features, generator=generator).to(base.device, base.dtype)
        weight_OI = linear.frozen_weight()
        y_MO, g_MI = F.linear(x_MI, weight_OI), g_MO.mm(weight_OI)
        for rows in _PROBE_ROWS:
            # Both from the front and from within: the rows must not care where they lie either.
            for start in {0, min(ROW_MULTIPLE, most - rows)}:
                cut = slice(start, start + rows)
                if not torch.equal(F.linear(x_MI[cut], weight_OI), y_MO[cut]):
                    return False
                if not torch.equal(g_MO[cut].mm(weight_OI), g_MI[cut]):
                    return False
    return True
