"""Names that tables of cases share with what makes their files."""

CLASS_NAMES = ("one", "three", "two two")
IMAGE_FORMATS = ("jpg", "png", "webp", "bmp", "ppm")
VIDEO_FORMATS = ("mp4", "mkv", "webm", "avi", "mov", "ts", "flv", "wmv", "3gp")
DAMAGES = (  # see attacks.damage
    "empty", "one_byte", "cut_1", "cut_10", "cut_50", "cut_90", "cut_99", "flip_1", "flip_10", "flip_100",
    "flip_header", "zero_start", "zero_middle", "zero_end", "repeated", "reversed", "noise", "appended",
)  # fmt: skip
MARKER = "executed"  # a file in the sandbox that code makes which should not have run
