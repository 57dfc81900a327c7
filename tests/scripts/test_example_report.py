import example_report
import pytest

import vwt
from vwt import LatencyProfile, Plan
from vwt.pictures.report.front import read_peers


def test_the_plan_is_what_was_recorded(tmp_path, small_vit):
    plan = example_report.make_plan(LatencyProfile.identify(small_vit) | {"model": example_report.MODEL})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.chosen.schedule == vwt.PruningSchedule({4: vwt.Absorb(98)})
    figures = (plan.chosen.ratio, plan.chosen.kl, plan.chosen.agreement)
    assert figures == pytest.approx((0.85, 0.03, 0.95), abs=0.005)
    assert plan.chosen in plan.front
    assert {row.method for row in read_peers(example_report.RECORDED, plan)} > {"ToMe", "POMT", "random drop"}


def test_an_error_is_one_line(capsys, tmp_path):
    assert example_report.main(["--out", str(tmp_path / "absent" / "report.html")]) == 2
    _, err = capsys.readouterr()
    assert err.startswith("example_report: cannot write the report")
    assert err.count("\n") == 1
