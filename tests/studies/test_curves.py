from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.studies.curves import HEIGHT, TOP, Point, curves_svg, ticks

SVG = "{http://www.w3.org/2000/svg}"


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_hold_what_they_are_for(low: float, width: float) -> None:
    marks = ticks(low, low + width)
    slack = 1e-6 * max(1.0, abs(low), width)
    assert marks[0] <= low + slack
    assert marks[-1] >= low + width - slack
    assert 2 <= len(marks) <= 8
    assert marks == sorted(set(marks))


def test_a_picture_has_a_line_per_method_in_each_panel_and_a_description() -> None:
    lines = {"a<b": [Point("0.9", 2.0, 0.1), Point("1.1", 3.0)], "c": [Point("0.9", 2.5), Point("1.1", 2.2)]}
    root = ElementTree.fromstring(curves_svg({"mean": lines, "worst": lines}, "knob", "title"))
    assert len(root.findall(f"{SVG}polyline")) == 4
    assert len(root.findall(f"{SVG}circle")) == 8
    texts = [each.text for each in root.findall(f"{SVG}text")]
    assert {"a<b", "c", "knob", "title", "mean", "worst", "0.9", "1.1"} <= set(texts)


def test_points_stand_at_their_height() -> None:
    root = ElementTree.fromstring(curves_svg({"mean": {"m": [Point("x", 2.0), Point("y", 3.0)]}}, "knob", "title"))
    heights = [float(each.attrib["cy"]) for each in root.findall(f"{SVG}circle")]
    marks = ticks(2.0, 3.0)
    expected = [TOP + HEIGHT * (1 - (value - marks[0]) / (marks[-1] - marks[0])) for value in (2.0, 3.0)]
    assert heights == pytest.approx(expected, abs=0.1)
