"""The README's picture."""

from conftest import TINY

from docs.demo_picture import draw, of_kind, predict
from stpm_plugin import DemoData


def test_a_column_for_each_case(trained, demo_root):
    """Image, truth, and map with the verdict and the image score below it."""
    cases = predict(trained, DemoData(root=demo_root, val_split_mode="none", **TINY))
    assert len(cases) == len(list(demo_root.glob("*/test/*/*.png")))
    good = of_kind(cases, "good")
    assert len(good) == len(list(demo_root.glob("*/test/good/*.png")))
    figure = draw(cases[:3])
    assert len(figure.axes) == 3 * 3
    assert [axis.get_title() for axis in figure.axes[:3]] == [case["kind"].replace("_", " ") for case in cases[:3]]
    assert figure.axes[-1].get_xlabel().endswith(f", {cases[2]['score']:.2f}")
