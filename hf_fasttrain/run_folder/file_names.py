"""The names of the files and folders in a run folder, written once. This module imports nothing.

A run folder is a recipe's output_dir (`Trainer(output_dir=...)`): what a training leaves on disk.
"""

RECIPE_FILE = "recipe.yaml"
RESOLVED_FILE = "resolved.yaml"  # every setting, with `auto` resolved
CUSTOM = "custom."  # prefix of its settings that name parts which were passed in Python
METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
PREDICTIONS_FILE = "predictions.safetensors"
BAD_IMAGES_FILE = "bad_images.jsonl"
REPORT_FILE = "report.html"
PUSHED_FILE = "hub.json"  # the last push

CROSSVAL_FILE = "crossval.json"  # of a folder with a run for each fold

MODEL_FOLDER = "model"
SPEC_FILE = "hf_fasttrain.json"
CONFIG_FILE = "config.json"  # for timm and transformers
CALIBRATION_FILE = "calibration.json"  # temperature and thresholds of the weights
WEIGHTS_FILE = "model.safetensors"  # in checkpoints too
ONNX_FILE = "model.onnx"
MODEL_FILES = (SPEC_FILE, CONFIG_FILE, WEIGHTS_FILE)  # of which a model's folder has one

CHECKPOINTS_FOLDER = "checkpoints"
EMA_FILE = "ema.safetensors"
STATE_FILE = "state.json"
AVERAGED_FOLDER = "averaged"  # in that of checkpoints: weights for checkpoint.final=average

LABEL_ERRORS_FOLDER = "mislabeled"  # likely label errors: the table to correct, a page, pictures
LABEL_ERRORS_FILE, LABEL_ERRORS_PAGE = "labels.csv", "mislabeled.html"

GALLERY_FOLDER = "report"  # the report's pictures
GALLERY_FILE = "gallery.json"
CURVES_PICTURE, CONFUSION_PICTURE = "curves.png", "confusion.png"  # of the model card

TRACKERS_FOLDER = "trackers"
STAGING_FOLDER = ".hub"  # runs that are being pushed
LOCK_FILE = ".lock"  # in the folder of checkpoints

FILES_WHILE_TRAINING = (RECIPE_FILE, RESOLVED_FILE, METRICS_FILE)
RUN_FILES = (*FILES_WHILE_TRAINING, RESULT_FILE)
