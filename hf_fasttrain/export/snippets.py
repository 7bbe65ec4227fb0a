"""Complete programs that open an exported model without this package: `python classify.py IMAGE`.

Each prints the five best classes of an image file with their scores.
"""

from __future__ import annotations

import json

TIMM = """\
import sys

import timm
import torch
from PIL import Image, ImageOps

model = timm.create_model({location}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
class_names = model.pretrained_cfg["label_names"]

image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
with torch.inference_mode():
    scores = model(transform(image)[None]).{scores}[0]
best = scores.topk(min(5, len(class_names)))
for score, index in zip(best.values.tolist(), best.indices.tolist()):
    print(f"{{score:.5f}}  {{class_names[index]}}")
"""

OWN = """\
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

model = ...  # as the program makes it
model.load_state_dict(load_file(hf_hub_download({location}, "model.safetensors")))
"""

TRANSFORMERS = """\
import sys

from transformers import pipeline

classify = pipeline("image-classification", model={location})
for prediction in classify(sys.argv[1], top_k=5):
    print(f"{{prediction['score']:.5f}}  {{prediction['label']}}")
"""

ONNX = """\
import json
import sys

import numpy as np
import onnxruntime
{imports}from PIL import Image, ImageOps

session = onnxruntime.InferenceSession({file}, providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
class_names, steps = json.loads(metadata["class_names"]), json.loads(metadata["preprocessing"])

image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
(width, height), side, size = image.size, steps["resize_px"], steps["image_size"]
if steps["crop_mode"] == "squash":
    width, height = side, side
elif width <= height:
    width, height = side, int(side * height / width)
else:
    width, height = int(side * width / height), side
image = image.resize((width, height), Image.Resampling[steps["interpolation"].upper()])
rounded = int if steps["crop_mode"] == "center_floor" else round
left, top = rounded((width - size) / 2), rounded((height - size) / 2)
pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
images = ((pixels - np.float32(steps["mean"])) / np.float32(steps["std"])).transpose(2, 0, 1)[None]

logits = session.run(["logits"], {{"images": images}})[0][0]
if json.loads(metadata["multi_label"]):
    scores = 1 / (1 + np.exp(-logits))
else:
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
for index in np.argsort(-scores)[:5]:
    print(f"{{scores[index]:.5f}}  {{class_names[index]}}")
"""


def timm_snippet(location: str, *, multi_label: bool = False) -> str:
    """Return a program that opens the model in timm; `location` is ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``."""
    return TIMM.format(location=_quoted(location), scores="sigmoid()" if multi_label else "softmax(1)")


def own_snippet(location: str) -> str:
    """Return a program that loads the weights of a user's own model; `location` is OWNER/NAME on the Hub."""
    return OWN.format(location=_quoted(location))


def transformers_snippet(location: str) -> str:
    """Return a program that opens the model in transformers; `location` is OWNER/NAME on the Hub or a folder."""
    return TRANSFORMERS.format(location=_quoted(location))


def onnx_snippet(location: str = "model.onnx") -> str:
    """Return a program that needs Pillow, numpy and onnxruntime; `location` is a file or OWNER/NAME on the Hub."""
    if location.endswith(".onnx"):
        return ONNX.format(imports="", file=_quoted(location))
    imports = "from huggingface_hub import hf_hub_download\n"
    return ONNX.format(imports=imports, file=f'hf_hub_download({_quoted(location)}, "model.onnx")')


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a Python string too
