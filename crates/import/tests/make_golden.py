"""Golden values for the dequantisation tests: blocks and the f32 values that the reference makes of them.

usage: pip install gguf==0.19.0 && python make_golden.py > golden/quants.json
"""
import json

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
# Where a block holds f16 scales, which must be finite; all other bytes may be anything.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}

random = np.random.default_rng(20)
golden = {}
for kind in KINDS:
    values, size = GGML_QUANT_SIZES[Type[kind]]
    if values == 1:
        floats = np.concatenate([random.normal(0, 1, 12), [0.0, -0.0, 6e-8, 65504.0]]).astype(np.float32)
        if kind == "F16":
            blocks = floats.astype(np.float16).view(np.uint8)
        elif kind == "BF16":
            blocks = (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            blocks = floats.view(np.uint8)
    else:
        blocks = random.integers(0, 256, (3, size), dtype=np.uint8)
        for at in SCALES[kind]:
            # The last block's scale is subnormal.
            scales = np.array([0.0123, -1.7, 3e-7], dtype=np.float16) * np.float16(1 + at)
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(3, 2)
    floats = dequantize(blocks, Type[kind]).astype(np.float32).ravel()
    golden[kind] = {"blocks": blocks.tobytes().hex(), "values": floats.tobytes().hex()}
print(json.dumps(golden, indent=1))
