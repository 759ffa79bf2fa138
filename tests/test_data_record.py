"""How images are named in the record of a training."""

from pathlib import PurePosixPath, PureWindowsPath

import pytest

from stpm_plugin.training.data_record import names_of


@pytest.mark.parametrize(
    ("kind", "paths", "names"),
    [
        (PurePosixPath, ["/a/b/1.png", "/a/c/2.png"], ["b/1.png", "c/2.png"]),
        (PurePosixPath, ["/a/1.png"], ["1.png"]),
        (PurePosixPath, ["/a/1.png", "/b/2.png"], ["a/1.png", "b/2.png"]),
        (PureWindowsPath, [r"C:\a\b\1.png", r"c:\A\2.png"], ["b/1.png", "2.png"]),
        (PureWindowsPath, [r"C:\a\1.png", r"D:\a\2.png"], ["C:/a/1.png", "D:/a/2.png"]),
    ],
)
def test_images_are_named_from_the_folder_above_them_or_by_their_drives(kind, paths, names):
    assert names_of([kind(path) for path in paths]) == names
