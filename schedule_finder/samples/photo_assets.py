"""Photographed objects and backgrounds for the photo scenes: from Debian packages, or a small drawn stand-in.

The photographs are never part of this repository. `fetch_photographs` downloads three Debian packages with
``apt-get download`` and unpacks them with ``dpkg -x`` into a cache folder; neither needs root rights nor
installs anything.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from schedule_finder.errors import InputError

PACKAGES = ("tuxpaint-stamps-default", "mate-backgrounds", "plasma-workspace-wallpapers")
OBJECT_SIZE = 200  # pixels: longer side of a loaded object
BACKGROUND_SIZE = 1000  # pixels: longer side of a loaded background

STAMPS = Path("usr/share/tuxpaint/stamps")
NATURE = Path("usr/share/backgrounds/mate/nature")
WALLPAPERS = Path("usr/share/wallpapers")

_WORDS = (
    "airplane apricot badger basketball bear beaver bison bus camel camera chicken chimpanzee clownfish cow crow "
    "daffodil deer dog dolphin donkey drums duck elephant ferret flamingo football fox frog giraffe goat gorilla "
    "grasshopper guitar hammer hippopotamus horse iguana iris kangaroo kettle kiwifruit koala lemon lightbulb lion "
    "mailbox mantis moon mug mushroom onion ostrich otter owl peacock pelican penguin pig pigeon pineapple pinecone "
    "rabbit rooster rose seahorse sheep squirrel strawberry tiger toolbox toucan tricycle trophy trumpet turkey "
    "violin vulture walnut wombat wrench zebra"
)
NAMES = tuple(_WORDS.split())
"""Names of the objects: one photographed motif each, and no two that look alike at the size of a scene's cell."""

_DESCRIPTIONS = {
    "bus": "green bus",
    "drums": "drum kit",
    "flamingo": "pink flamingo",
    "football": "american football",
    "guitar": "classical guitar",
    "kangaroo": "red kangaroo",
    "kettle": "electric kettle",
    "lemon": "yellow lemon",
    "moon": "full moon",
    "mushroom": "cep",
    "rooster": "colorful rooster",
    "tricycle": "pink tricycle",
    "trophy": "trophy cup",
}
"""The package's description of an object, without its article, where it is not the object's name."""

_NATURE_NAMES = (
    *("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm"),
    *("TwoWings", "Wood", "YellowFlower"),
)
_WALLPAPER_NAMES = (
    *("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite"),
    *("OneStandsOut", "Path", "summer_1am"),
)
BACKGROUNDS = (*_NATURE_NAMES, *_WALLPAPER_NAMES)
HELD_OUT_BACKGROUNDS = frozenset({"Dune", "YellowFlower", "ColdRipple", "EveningGlow", "Path"})
"""Backgrounds that no training scene has; all other scenes have one of these."""


@dataclass(frozen=True)
class PhotoAssets:
    """What scenes are composed of.

    ``objects``: RGBA pictures of every name, cropped to what is not transparent. ``backgrounds``: RGB pictures
    by name. ``source``: "photographs" or "drawn".
    """

    objects: dict[str, tuple[Image.Image, ...]]
    backgrounds: dict[str, Image.Image]
    source: str


def cache_folder() -> Path:
    """Where photographs and weights are kept: ``$ADAPTINFER_CACHE``, or ``adaptinfer`` in the user's cache."""
    own = os.environ.get("ADAPTINFER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "adaptinfer"


def fetch_photographs(folder: Path) -> Path:
    """Download and unpack the packages that ``folder`` does not hold yet; returns the folder to load from.

    Raises:
        InputError: ``apt-get`` or ``dpkg`` is missing, or a download fails.
    """
    root = folder / "photographs"
    for package in PACKAGES:
        finished = root / f".{package}"
        if finished.exists():
            continue
        downloads = folder / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        archives = sorted(downloads.glob(f"{package}_*.deb"))
        if not archives:
            _run(["apt-get", "download", package], downloads, package)
            archives = sorted(downloads.glob(f"{package}_*.deb"))
        root.mkdir(parents=True, exist_ok=True)
        _run(["dpkg", "-x", str(archives[-1]), str(root)], downloads, package)
        finished.touch()
    return root


def _run(command: list[str], folder: Path, package: str) -> None:
    advice = (
        f"on Debian or Ubuntu run `apt-get update`; elsewhere unpack the Debian package {package} by hand "
        f"into {folder.parent / 'photographs'} and create the empty file .{package} there"
    )
    if shutil.which(command[0]) is None:
        raise InputError(f"photographs: `{command[0]}` is not installed; {advice}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"photographs: `{' '.join(command[:2])} {package}` failed ({reason}); {advice}")


def load_photographs(folder: Path | None = None) -> PhotoAssets:
    """Load the photographs that `fetch_photographs` left in ``folder`` (default: the cache folder).

    Raises:
        InputError: the photographs are not there.
    """
    root = (folder or cache_folder()) / "photographs"
    if not all((root / f".{package}").exists() for package in PACKAGES):
        raise InputError(
            f"photographs: none in {root}; run `python -m scripts.build_photo_backbone --photographs-only` first"
        )
    files = _stamp_files(root / STAMPS)
    missing = [name for name in NAMES if name not in files]
    if missing:
        raise InputError(
            f"photographs: {root / STAMPS} has no {missing[0]!r}; the package {PACKAGES[0]} is of another version"
        )
    objects = {name: tuple(_load_object(path) for path in files[name]) for name in NAMES}
    return PhotoAssets(objects, {name: _load_background(root, name) for name in BACKGROUNDS}, "photographs")


def _stamp_files(folder: Path) -> dict[str, list[Path]]:
    """The pictures of every name, by the one-line descriptions beside them; cartoons are left out."""
    names = {_DESCRIPTIONS.get(name, name): name for name in NAMES}
    found: dict[str, list[Path]] = {}
    for text in sorted(folder.rglob("*.txt")):
        picture = text.with_suffix(".png")
        if "cartoon" in text.parts or not picture.exists():
            continue
        description = text.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
        plain = re.sub(r"\(.*?\)", "", description[0]) if description else ""
        words = plain.strip().rstrip(".!").lower().split()
        if words[:1] and words[0] in ("a", "an", "the", "some"):
            words = words[1:]
        name = names.get(" ".join(words))
        if name:
            found.setdefault(name, []).append(picture)
    return found


def _load_object(path: Path) -> Image.Image:
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    picture = picture.crop(box) if box else picture
    picture.thumbnail((OBJECT_SIZE, OBJECT_SIZE))
    return picture


def _load_background(root: Path, name: str) -> Image.Image:
    path = root / NATURE / f"{name}.jpg"
    if name in _WALLPAPER_NAMES:
        path = root / WALLPAPERS / name / "contents/images/2560x1600.jpg"
    with Image.open(path) as file:
        file.draft("RGB", (BACKGROUND_SIZE, BACKGROUND_SIZE))
        picture = file.convert("RGB")
    picture.thumbnail((BACKGROUND_SIZE, BACKGROUND_SIZE))
    return picture


def drawn_assets() -> PhotoAssets:
    """A stand-in drawn in this process, for tests: coloured polygons on plain gradients, clearly no photographs."""
    objects: dict[str, tuple[Image.Image, ...]] = {
        name: (_polygon(number),) for number, name in enumerate(NAMES)
    }
    backgrounds = {name: _gradient(number) for number, name in enumerate(BACKGROUNDS)}
    return PhotoAssets(objects, backgrounds, "drawn")


def _polygon(number: int) -> Image.Image:
    """A polygon of 3 to 9 corners in one of twelve hues; every number gives another picture."""
    corners, hue = 3 + number % 7, 30 * (number // 7)
    picture = Image.new("RGBA", (120, 120))
    fill = Image.new("HSV", (1, 1), (hue * 255 // 360, 220, 230)).convert("RGB").getpixel((0, 0))
    points = [
        (60 + 55 * math.sin(2 * math.pi * k / corners), 60 - 55 * math.cos(2 * math.pi * k / corners))
        for k in range(corners)
    ]
    ImageDraw.Draw(picture).polygon(points, fill=fill, outline="black")
    return picture.crop(picture.getbbox())


def _gradient(number: int) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((640, 480))
    shade = 40 + 8 * number
    return Image.merge(
        "RGB", (ramp, ramp.point(lambda level: level // 2 + 60), Image.new("L", ramp.size, shade))
    )
