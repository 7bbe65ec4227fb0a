"""Names in folders of images: which files are images, which folders are splits, and what a system or a program left.

A new file type needs its suffix in IMAGE_FORMATS, and must be one that pixels/decode.py can decode.
"""

from __future__ import annotations

# Pillow's name of a format -> its suffixes.
IMAGE_FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jpeg2000"),
    "PNG": (".png", ".apng"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
# Images, too, which are not read: their names are counted, so that no class of photos is left out unnoticed.
UNREAD_SUFFIXES = frozenset(
    {
        *(
            ".heic",
            ".heif",
            ".hif",
            ".avif",
            ".avifs",
            ".dib",
            ".jxl",
            ".jxr",
            ".wdp",
            ".exr",
            ".hdr",
            ".pfm",
            ".tga",
            ".qoi",
            ".pcx",
        ),
        *(".psd", ".psb", ".xcf", ".kra", ".svg", ".svgz", ".eps", ".ps", ".ai", ".wmf", ".emf", ".djvu", ".ico"),
        *(".dcx", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".cur", ".dds", ".xbm", ".xpm", ".jbig2", ".jp3d", ".icns"),
        *(".dcm", ".dicom", ".nii", ".mha", ".nrrd", ".fit", ".fits", ".fts"),  # of medicine and astronomy
        *(
            ".raw",
            ".dng",
            ".cr2",
            ".cr3",
            ".crw",
            ".nef",
            ".nrw",
            ".arw",
            ".srf",
            ".sr2",
            ".orf",
            ".rw2",
            ".raf",
            ".pef",
        ),
        *(".srw", ".x3f", ".3fr", ".erf", ".kdc", ".mrw", ".rwl", ".iiq"),  # of cameras
    }
)
TABLE_SUFFIXES = (".parquet", ".arrow")
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "val", "valid", "dev")
TEST_NAMES = ("test", "testing")
SPLIT_FOLDERS = {*TRAIN_NAMES, *EVAL_NAMES, *TEST_NAMES}
SPLIT_OF = {name: names[0] for names in (TRAIN_NAMES, EVAL_NAMES, TEST_NAMES) for name in names}

# In lower case. Besides these, whatever starts with a dot is hidden: .DS_Store, ._0.jpg, .ipynb_checkpoints.
_MADE_BY_TOOLS = {
    *("__macosx", "__pycache__", "icon\r", "temporary items", "network trash folder"),  # macOS, Python
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information"),  # Windows
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found"),  # network drives, Linux
}


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case, with its dot; something without a dot if it has none."""
    return name[name.rfind(".") :].lower()


def is_made_by_tool(name: str) -> bool:
    """Return whether a file or folder is not the user's data, by its name: hidden, a thumbnail, a lock, a bin."""
    lower = name.lower()
    return lower.startswith((".", "~$")) or lower in _MADE_BY_TOOLS or lower.endswith((".lock", ".lck"))
