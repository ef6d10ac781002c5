"""Sizes by resolution and aspect ratio: the tables of Open-Sora 1.1 to 1.3 and the rule of 2.0.

In 1.x a ratio is height over width ("0.56" or "9:16" is a landscape video); in 2.0 it is width to height ("16:9" is).
Sizes are (height, width). A literal such as "64x96" is a resolution with that one size.
"""

import math

VERSIONS = ("1.1", "1.2", "1.3", "2.0")

# Ratios of Open-Sora's own tables, then their sizes at each resolution, in the same order.
_RATIOS = {
    "3:8": "0.38", "9:21": "0.43", "12:25": "0.48", "1:2": "0.50", "9:17": "0.53", "27:50": "0.54", "9:16": "0.56",
    "5:8": "0.62", "2:3": "0.67", "3:4": "0.75", "1:1": "1.00", "4:3": "1.33", "3:2": "1.50", "16:9": "1.78",
    "17:9": "1.89", "2:1": "2.00", "50:27": "2.08",
}  # fmt: skip
_SIZES = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 "
    "221x165 235x156 256x144 263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 "
    "370x278 392x262 426x240 440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 "
    "554x416 588x392 640x360 660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 "
    "740x555 784x522 854x480 880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 "
    "1108x832 1176x784 1280x720 1320x698 1358x680 1386x666",
    "1080p": "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 "
    "1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
    "2k": "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 1568x2352 1662x2216 "
    "1920x1920 2218x1664 2352x1568 2560x1440 2638x1396 2716x1358 2772x1330",
    "4k": "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326 "
    "2880x2880 3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994",
}
_PIXELS = {
    "144p": 36864, "256": 65536, "240p": 102240, "360p": 230400, "512": 262144, "480p": 409920, "720p": 921600,
    "1024": 1048576, "1080p": 2073600, "2k": 3686400, "2048": 4194304, "2880": 8294400, "4k": 8294400,
}  # fmt: skip
_SINCE_1_2 = ("2k", "2048", "2880")

# PixArt's forty ratios, in sixteenths of 256 (512, 1024 and 2048 are exact multiples), and in units of 64 for 2880.
_PIXART = {
    "0.25": "8x32", "0.26": "8x31", "0.27": "8x30", "0.28": "8x29", "0.32": "9x28", "0.33": "9x27", "0.35": "9x26",
    "0.4": "10x25", "0.42": "10x24", "0.48": "11x23", "0.5": "11x22", "0.52": "11x21", "0.57": "12x21", "0.6": "12x20",
    "0.68": "13x19", "0.72": "13x18", "0.78": "14x18", "0.82": "14x17", "0.88": "15x17", "0.94": "15x16",
    "1.0": "16x16", "1.07": "16x15", "1.13": "17x15", "1.21": "17x14", "1.29": "18x14", "1.38": "18x13",
    "1.46": "19x13", "1.67": "20x12", "1.75": "21x12", "2.0": "22x11", "2.09": "23x11", "2.4": "24x10", "2.5": "25x10",
    "2.89": "26x9", "3.0": "27x9", "3.11": "28x9", "3.62": "29x8", "3.75": "30x8", "3.88": "31x8", "4.0": "32x8",
}  # fmt: skip
_PIXART_2880 = {
    "0.25": "22x90", "0.26": "22x87", "0.27": "22x84", "0.28": "22x81", "0.32": "25x78", "0.33": "25x75",
    "0.34": "25x73", "0.4": "28x70", "0.42": "28x67", "0.47": "30x64", "0.49": "30x61", "0.51": "30x59",
    "0.55": "33x60", "0.59": "33x56", "0.68": "36x53", "0.72": "36x50", "0.78": "39x50", "0.83": "39x47",
    "0.89": "42x47", "0.93": "42x45", "1.0": "45x45", "1.07": "45x42", "1.12": "47x42", "1.21": "47x39",
    "1.28": "50x39", "1.39": "50x36", "1.47": "53x36", "1.7": "56x33", "1.82": "60x33", "2.03": "61x30",
    "2.13": "64x30", "2.39": "67x28", "2.5": "70x28", "2.92": "73x25", "3.0": "75x25", "3.12": "78x25",
    "3.68": "81x22", "3.82": "84x22", "3.95": "87x22", "4.0": "90x22",
}  # fmt: skip

_RATIOS_2_0 = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")  # width : height


def resolutions(version: str) -> list[str]:
    """Names that a bucket table of 1.x may use (2.0 takes any NNNp or NNNpx)."""
    names = [name for name in _PIXELS if version != "1.1" or name not in _SINCE_1_2]
    return names + [f"{name}_16d" for name in names] if version == "1.3" else names


def aspect_table(
    resolution: str, version: str = "1.2", *, multiple: int = 16
) -> tuple[int, dict[str, tuple[int, int]]]:
    """(pixels, {ratio: (height, width)}) of a resolution; `multiple` is the size grid of 2.0 (32 with its DC-AE)."""
    if literal := _literal(resolution):
        return literal[0] * literal[1], {f"{literal[0] / literal[1]:.2f}": literal}
    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r}; one of {', '.join(VERSIONS)}")
    if version == "2.0":
        return _table_2_0(resolution, multiple)
    if resolution not in resolutions(version):
        raise ValueError(f"unknown resolution {resolution!r} in {version}; one of {', '.join(resolutions(version))}")
    name = resolution.removesuffix("_16d")
    table = _own_or_pixart(name)
    if version == "1.3":
        table = {f"{float(ratio):.2f}": size for ratio, size in table.items()}
    if resolution != name:
        table = {ratio: (height // 16 * 16, width // 16 * 16) for ratio, (height, width) in table.items()}
    return _PIXELS[name], table


def in_tables(height: int, width: int) -> bool:
    """Whether 1.x trained at this size. Its tables have sides that no VAE divides; these are cut (426 pixels, 53 latents)."""
    return any((height, width) in aspect_table(name, "1.2")[1].values() for name in resolutions("1.2"))


def closest_ratio(height: float, width: float, table: dict[str, tuple[int, int]]) -> str:
    """The ratio of the table nearest to a clip's own; the first wins a tie."""
    return min(table, key=lambda name: abs(ratio_value(name) - height / width))


def ratio_value(name: str) -> float:
    """Height over width of a ratio as the tables spell it: "0.56" (1.x) or "16:9" (2.0, width to height)."""
    if ":" in name:
        width, height = map(float, name.split(":"))
        return height / width
    return float(name)


def image_size(resolution: str, aspect_ratio: str, version: str = "1.2", *, multiple: int = 16) -> tuple[int, int]:
    """(height, width) to sample at. 1.x: "9:16" (height:width) or "0.56"; 2.0: "16:9" (width:height)."""
    if version == "2.0" and not _literal(resolution):
        table = sizes_2_0(_pixels_2_0(resolution), multiple=multiple, training=False)
        key = aspect_ratio
    else:
        _, table = aspect_table(resolution, version)
        key = _RATIOS.get(aspect_ratio, aspect_ratio)
        if key not in table and ":" not in key:
            key = next((name for name in table if float(name) == float(key)), key)
    if key not in table:
        known = ", ".join(table if version == "2.0" else _RATIOS)
        raise ValueError(f"unknown aspect ratio {aspect_ratio!r} at {resolution}; one of {known}")
    return table[key]


def sizes_2_0(pixels: int, *, multiple: int = 16, training: bool = True) -> dict[str, tuple[int, int]]:
    """2.0: every ratio at about this area, on the grid; training moves a size one step nearer to the area, sampling not."""
    wide, tall = {}, {}
    for name in _RATIOS_2_0:
        ratio_width, ratio_height = map(float, name.split(":"))
        width = int(math.sqrt(pixels * ratio_width / ratio_height) // multiple) * multiple
        height = int((pixels / width) // multiple) * multiple
        if training:
            height, width = _nearest_area(height, width, pixels, multiple)
            if (height, width) in wide.values():
                continue
        wide[name] = (height, width)
        tall[":".join(reversed(name.split(":")))] = (width, height)
    return wide | tall


def _nearest_area(height, width, pixels, step):
    """The best of the size and its four neighbours, all taken from the size as floored; the earlier wins a tie."""
    near = [
        (height, width),
        (height - step, width),
        (height + step, width),
        (height, width - step),
        (height, width + step),
    ]
    return min(near, key=lambda size: abs(size[0] * size[1] - pixels))


def _table_2_0(resolution, multiple):
    name, _, setting = resolution.partition("_")
    pixels = _pixels_2_0(name)
    table = sizes_2_0(pixels, multiple=multiple)
    if setting == "max":
        largest = max(table, key=lambda ratio: table[ratio][0] * table[ratio][1])
        table = {largest: table[largest]}
    elif setting.startswith("ar") and setting[2:] in table:
        table = {setting[2:]: table[setting[2:]]}
    elif setting:
        raise ValueError(f"unknown setting {setting!r} of {resolution!r}; max or ar with one of {', '.join(table)}")
    return pixels, table


def _pixels_2_0(name: str) -> int:
    name = name.split("_")[0]
    digits = name.removesuffix("px").removesuffix("p")
    if not digits.isdigit() or digits == name:
        raise ValueError(f"unknown resolution {name!r} in 2.0; NNNpx (a square's side) or NNNp (16:9), such as 256px")
    side = int(digits)
    return side * side if name.endswith("px") else int(side * side / 9 * 16)


def _own_or_pixart(name):
    if name in _SIZES:
        return dict(zip(_RATIOS.values(), map(_size, _SIZES[name].split())))
    table, unit = (_PIXART_2880, 64) if name == "2880" else (_PIXART, int(name) // 16)
    return {ratio: (height * unit, width * unit) for ratio, (height, width) in zip(table, map(_size, table.values()))}


def _size(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def _literal(resolution: str) -> tuple[int, int] | None:
    height, _, width = resolution.partition("x")
    return (int(height), int(width)) if height.isdigit() and width.isdigit() else None
