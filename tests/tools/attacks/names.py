"""Constants that the tables share with `build`."""

CLASS_NAMES = ("one", "three", "two two")
IMAGE_FORMATS = ("jpg", "png", "webp", "bmp", "ppm")
VIDEO_FORMATS = ("mp4", "mkv", "webm", "avi", "mov", "ts", "flv", "wmv", "3gp")
DAMAGES = (  # see attacks.damage
    "empty",
    "one_byte",
    "cut_1",
    "cut_10",
    "cut_50",
    "cut_90",
    "cut_99",
    "flip_1",
    "flip_10",
    "flip_100",
    "flip_header",
    "zero_start",
    "zero_middle",
    "zero_end",
    "repeated",
    "reversed",
    "noise",
    "appended",
)
MARKER = "executed"  # a file in the sandbox that only maliciously executed code creates

NINES = "9" * 5000  # Python does not parse integers of more than 4,300 digits
LONG = "x" * 5000  # longer than a file name may be
DEEP = "[" * 100_000  # JSON nested more deeply than a parser's stack
TRAP = "<script>alert(1)</script><!--<script>"  # a name that must be escaped in HTML
# Contents that replace a JSON file.
JSON_TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "null": "null",
    "list": "[]",
    "number": "5",
    "nested": DEEP,
    "not UTF-8": b"\xff\xfe{}",
    "byte order mark": "\ufeff{}",
    "NUL": "\0",
    "half": '{"class_names": ["a"',
    "1e400": '{"config": 1e400}',
    "5,000 digits": '{"config": ' + NINES + "}",
    "keys twice": '{"config": {}, "config": 5}',
}
