"""benchmark_large.py: its synthetic rows, exponents and tables, and a tiny run of all of it."""

import json

import benchmark
import benchmark_large as large
import numpy as np
import pytest
import torch

import MNIST_SAE_code as driver


def test_synthetic_rows_are_sparse_combinations_of_the_same_directions():
    parts = [rows for rows, _ in large.synthetic_rows(5000)]
    assert [len(part) for part in parts] == [4096, 904]
    z = torch.cat(parts)
    again = next(iter(large.synthetic_rows(4096)))[0]
    assert torch.equal(z[:4096], again)
    # Each entry sums ten uniform codes times standard normal numbers on average, and the noise.
    assert z.square().mean().item() == pytest.approx(10 / 3 + 0.05**2, rel=0.1)


def test_full_activity_has_so_many_features_in_each_row():
    activity = large.full_activity(300, 64)
    fires = torch.zeros(300, 64)
    fires[activity.image, activity.feature] += 1
    assert fires.sum(1).tolist() == [large.TARGET] * 300
    assert fires.max() == 1
    for k in range(64):
        image, _ = activity.of(k)
        assert image.tolist() == torch.nonzero(fires[:, k]).flatten().tolist()


def test_exponents_of_planted_growth():
    sizes = [(rows, latents) for rows in (10, 100, 1000) for latents in (4, 8)]
    values = [3 * rows**0.9 * latents**1.5 for rows, latents in sizes]
    assert large.exponents(sizes, values) == pytest.approx((0.9, 1.5))
    one = [(10, 4), (10, 8)]
    assert large.exponents(one, [1.0, 2.0]) == pytest.approx((0, 1))


def test_tables_count_pairs_per_feature():
    sizes = [(rows, latents) for rows in (1000, 2000) for latents in (32, 64)]
    cases = []
    for rows, latents in sizes:
        parts = [["usage", rows * latents / 1e6, 1.0], ["matching", rows * latents**2 / 1e9, 0.5]]
        cases.append({"parts": parts, "peak": 100.0})
    found = large.tables(sizes, cases)
    for row in found["seconds"]:
        growth = row.columns["~rows"], row.columns["~latents"]
        assert growth == pytest.approx((1, 1)), row.what
    assert found["seconds"][0].columns["2,000 x 64"] == 0.128
    assert found["share timed"][1].columns["1,000 x 32"] == 0.5
    peak, file = found["peak MiB"]
    assert peak.columns["~rows"] == pytest.approx(0)
    assert file.columns["2,000 x 32"] == pytest.approx(2000 * 128 * 4 / 2**20)


def test_a_tiny_run(tmp_path, capsys):
    path = tmp_path / "found.json"
    flags = f"--rows 2000 3000 --latents 32 64 --entries {2**16} --json {path}"
    large.main(flags.split())
    found = json.loads(path.read_text())
    assert list(found) == ["seconds", "share timed", "peak MiB"]
    shown = capsys.readouterr().out
    assert all(f"\n{title} " in shown for title in found)
    parts = [row["what"] for row in found["seconds"]]
    assert set(large.PAIRS) < set(parts)
    for row in found["seconds"]:
        assert all(row[f"{n:,} x {d}"] >= 0 for n in (2000, 3000) for d in (32, 64))
    share = {row["what"]: row["3,000 x 64"] for row in found["share timed"]}
    assert share["calibration"] == share["bank"] == pytest.approx(1024 / 3000)
    assert share["training, one pass"] == pytest.approx(large.STEPS / (3000 // 128))
    assert share["matching"] == pytest.approx(4 / 3000)
    assert share["removals"] == 1
    assert found["peak MiB"][0]["2,000 x 32"] > 100  # PyTorch alone takes more


@pytest.mark.parametrize(
    "given", ["--rows 100", "--latents 20", "--entries 10", "--nonsense", "--rows many"]
)
def test_arguments_that_cannot_be_used(given):
    with pytest.raises(driver.InputError, match=r"--\w+"):
        large.parse(given.split())


def test_a_process_that_fails_is_an_error(tmp_path):
    with pytest.raises(benchmark.CommandError, match="ended with status 2"):
        large.in_process(tmp_path / "missing" / "z.f32", 2000)


def test_a_case_is_explained_as_the_driver_would():
    z = torch.cat([rows for rows, _ in large.synthetic_rows(4096)])
    case = large.Case(z, 256, 2**20)
    assert driver.mean_actives(case.sae, z) == pytest.approx(large.TARGET, abs=1e-3)
    assert np.allclose(case.layer.standardised(z), z)
