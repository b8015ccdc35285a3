"""benchmark.py: operations counted, what is timed, the processes it starts, its tables."""

import dataclasses
import json
import math
import subprocess
import sys

import benchmark
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import feature_analysis as fa
import feature_confirmation as fc
import MNIST_SAE_code as driver
from mnist_data import DIGITS, Data, Split, TensorLoader

CPU = torch.device("cpu")
SECTIONS = """machine|stages|SAE step|threads|statements|page|command|busy|reference|scaling
peak memory"""
SHAPES = benchmark.Shapes(
    train=100, val=40, test=20, pixels=6, d_in=4, d_sae=8, classes=3
)  # operations small enough to be multiplied by hand


def noise_split(n: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, 28, 28, generator=generator)
    return Split(images, torch.arange(n) % 10)


@pytest.fixture(autouse=True)
def one_thread():
    """As in `benchmark.main`."""
    with driver.torch_threads(1):
        yield


@pytest.fixture(scope="module")
def explained() -> benchmark.Explained:
    """An untrained classifier of noise and an untrained SAE; nothing is analysed."""
    data = Data(noise_split(700, 0), noise_split(300, 1), noise_split(200, 2), DIGITS, "noise", "")
    settings = driver.Settings(sae_latents=64, target_actives=(20,))
    model = driver.new_classifier((784, settings.hidden_units, 10), 0, CPU).requires_grad_(False)
    pre = driver.collect_preactivations(model, data, True)
    sae = benchmark.random_sae(pre.standardised("val"), 64, 0)
    subject = driver.Subject(model, "", pre, "noise", "")
    trained = driver.TrainedSAE(sae, sae, {}, "")
    return benchmark.Explained(settings, data, subject, trained, None)


# --- Operations -----------------------------------------------------------------------------------


def test_operations_by_hand():
    s = SHAPES
    assert benchmark.product(2, 3, 5) == 60
    assert s.hidden(10) == 2 * 10 * 6 * 4
    assert s.head(10) == 2 * 10 * 4 * 3
    assert s.code(10) == 2 * 10 * 4 * 8
    assert s.turned(10) == 2 * 10 * 4 * 4
    assert s.step_products(10) == 5 * 640
    assert s.rare_latents(10) == 4 * (2 * 10 * 4 * 2)  # two of eight latents
    assert s.head_gradient(10) == 2 * (320 + 240)
    assert s.bank() == 1920 + 2560
    assert s.patterns() == 2 * 4 * 4 * 4 + 2 * 4 * 6 * 4 + 2 * 8 * 4 * 6
    assert s.logit_effects(30) == 1440 + 720 + 8 * 720
    assert s.logit_effects(1000) == 1920 + 960 + 8 * 960  # there are only 40 images
    assert s.ablation_effects(50) == 1920 + 2560 + 960 + 1200
    principal = 2 * 4 * 100 * 4 + 2 * (2 * 20 * 4 * 4)  # of d_in = 4 there are only four
    assert s.fidelity() == 6400 + 2 * 2560 + 9 * 1280 + principal + 12 * 480


def test_operations_of_both_trainings_by_hand(monkeypatch):
    monkeypatch.setattr(driver, "FULL_TRAIN_IMAGES", 100)  # so that epochs are passes
    settings = driver.Settings(
        sae_latents=8, target_actives=(2,), epochs_ffn=2, batch_ffn=30, epochs_sae_final=1
    )
    settings = dataclasses.replace(settings, batch_sae=20)
    # Two passes of three batches of 30.
    assert SHAPES.classifier(settings) == 180 * (2 * 48 + 3 * 24)
    # Five steps on 20 images, two of them with rare latents, two with the head.
    start = 2 * (100 * 32) + 100 * 24 + 3 * (100 * 64)
    steps = 5 * (5 * 20 * 64) + 2 * (4 * 20 * 16) + 2 * (2 * 20 * (32 + 24))
    assert SHAPES.training(settings) == start + steps + 2 * (4 * 64) + 40 * 64
    without_head = dataclasses.replace(settings, head_kl=0.0)
    assert SHAPES.training(settings) - SHAPES.training(without_head) == 2 * (2 * 20 * (32 + 24))


def operations(work, *given) -> int:
    """As PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        work(*given)
    return counter.get_total_flops()


def test_operations_are_those_that_pytorch_counts(explained, monkeypatch):
    monkeypatch.setattr(driver, "FULL_TRAIN_IMAGES", 700)
    for check in ("ExplainedLayer.refuse_chance", "refuse_no_gradients"):  # of a few images
        monkeypatch.setattr(f"feature_analysis.{check}", lambda *_, **__: None)
    e, s = explained, benchmark.shapes_of(explained.data, explained.settings)
    assert s == (700, 300, 200, 784, 128, 64, 10)
    given, n_eval = e.given(e.sae), 250
    model, loader, *coder = given
    bank = fa.collect_feature_bank(*given)
    pairs = int(bank.n_active.clamp(max=n_eval).sum())
    labels = e.data.test.labels
    counted = {
        s.classifier(e.settings): (driver.train_classifier, e.data.train, e.settings),
        s.hidden(1200): (driver.collect_preactivations, model, e.data, True),
        s.training(e.settings): (benchmark.trained_sae, e.subject, e.settings),
        s.fidelity(): (driver.measure, e.trained, e.subject, labels, benchmark.TARGET),
        s.bank(): (fa.collect_feature_bank, *given),
        s.patterns(): (fa.feature_input_patterns, model, *coder),
        s.logit_effects(n_eval): (fa.feature_logit_effects, *given, 1.0, n_eval),
        s.ablation_effects(pairs): (fa.feature_ablation_effects, *given, n_eval),
        s.code(s.d_sae): (fa.nearest_features, e.sae.W_dec),
    }
    assert isinstance(loader, TensorLoader)
    for expected, work in counted.items():
        # Single rows and the nine images that check linearity are left out.
        assert operations(*work) == pytest.approx(expected, rel=0.05), work[0].__name__


# --- The parts of a step --------------------------------------------------------------------------


def test_the_products_timed_are_those_of_the_gradients(explained):
    with torch.no_grad():
        batch = benchmark.Batch.of(benchmark.Course.begin(explained, 64))
        results = {name: work() for name, work in batch.products().items()}
    sae = batch.training.sae
    weights = [sae.W_enc, sae.W_dec]
    for weight in weights:
        weight.requires_grad_(True)
    loss = (sae(batch.x) - batch.x).square().mean()
    d_W_enc, d_W_dec = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(results["x^T d_pre"], d_W_enc)
    torch.testing.assert_close(results["f^T d_x_hat"], d_W_dec)
    torch.testing.assert_close(results["f W_dec"], sae(batch.x))
    torch.testing.assert_close(results["x W_enc"], sae.pre_threshold(batch.x))


def test_timing_the_parts_leaves_the_weights(explained):
    with torch.no_grad():
        batch = benchmark.Batch.of(benchmark.Course.begin(explained, 64))
        sae, d_pre = batch.training.sae, batch.d_pre.clone()
        before = {name: value.clone() for name, value in sae.named_parameters()}
        shapes = benchmark.shapes_of(explained.data, explained.settings)
        for parts in benchmark.step_parts(batch, shapes, explained.settings):
            for part in parts:
                part.work()
    torch.testing.assert_close(dict(sae.named_parameters()), before)
    assert torch.equal(batch.d_pre, d_pre)


def test_parts_run_as_often_as_training_runs_them(explained, monkeypatch):
    calls = {"head_gradient": 0, "add_rare_gradients": 0}

    def counting(name: str):
        original = getattr(driver, name)

        def counted(*given):
            calls[name] += 1
            return original(*given)

        return counted

    for name in calls:
        monkeypatch.setattr(driver, name, counting(name))
    course = benchmark.Course.begin(explained, 64)
    assert len(course.seconds(CPU)) == benchmark.STEPS
    per_step = {name: n / benchmark.STEPS for name, n in calls.items()}

    with torch.no_grad():
        batch = benchmark.Batch.of(course)
    shapes = benchmark.shapes_of(explained.data, explained.settings)
    _, others = benchmark.step_parts(batch, shapes, explained.settings)
    told = {part.what: part.per_step for part in others}
    assert told["head gradient"] == per_step["head_gradient"] == 0.5
    assert told["rare latents"] == per_step["add_rare_gradients"] == 0.25


# --- Tables and clocks ----------------------------------------------------------------------------


def test_cells():
    cells = [None, "12.3%", 1234567, 1234.56, 0.000123456, 0.0]
    expected = ["-", "12.3%", "1,234,567", "1,235", "0.0001235", "0"]
    assert [benchmark.cell(value) for value in cells] == expected


def test_the_best_of_each_position_is_averaged():
    assert benchmark.best_mean([[3.0, 1.0], [2.0, 5.0]]) == 1.5


def test_short_work_runs_three_times_at_least():
    results = iter(range(10))
    seconds, last = benchmark.timed(lambda: next(results), CPU)
    assert (len(seconds), last) == (3, 2)
    seconds, last = benchmark.timed(lambda: next(results), CPU, repeats=5)
    assert (len(seconds), last) == (5, 7)


def test_speed():
    columns = benchmark.speed_columns(6_000_000_000, 2.0, rate=12.0)
    assert columns == {"GFLOP": 6.0, "GFLOP/s": 3.0, "of one core": "25.0%"}
    assert set(benchmark.speed_columns(None, 2.0, rate=12.0).values()) == {None}


def test_largest_difference():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert benchmark.largest_difference([a, a], [a, b]) == 0.5
    assert benchmark.largest_difference([a], [a[:1]]) == math.inf
    assert benchmark.largest_difference([a], [a * math.nan]) == math.inf
    assert benchmark.largest_difference([a[:0]], [b[:0]]) == 0


# --- Other processes ------------------------------------------------------------------------------


def beside_a_busy_core(work) -> None:
    with benchmark.busy_core() as process:
        work(process)


def test_the_busy_process_ends_with_the_block():
    seen = []

    def fail(process: subprocess.Popen) -> None:
        seen.append(process)
        assert process.poll() is None
        raise KeyError

    with pytest.raises(KeyError):
        beside_a_busy_core(fail)
    assert seen[0].returncode is not None


def test_a_busy_process_that_ended_early_is_reported():
    def end(process: subprocess.Popen) -> None:
        process.kill()
        process.wait()

    with pytest.raises(RuntimeError, match="ended too early"):
        beside_a_busy_core(end)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps the parent's number")
def test_the_busy_process_ends_when_its_parent_is_another():
    line = [sys.executable, "-c", benchmark.BUSY, "0"]
    assert subprocess.run(line, timeout=20).returncode == 0


RECORD = {
    "baseline_acc": 0.9,
    "recon_acc_jumprelu": 0.8,
    "agreement_jumprelu": 0.7,
    "fvu": 0.1,
    "achieved_actives_test": 20.0,
    "dead_features": 3,
    "seconds": {"sae": 1.5},
}
STUB = f"""
import json, pathlib, sys
if "--seed 13" in " ".join(sys.argv):
    sys.exit(3)
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
record = {{**{RECORD!r}, "given": sys.argv[1:-1]}}
(folder / "summary.json").write_text(json.dumps([record]))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A script in the place of the driver's, which fails with the seed 13."""
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    monkeypatch.setattr(benchmark, "SCRIPT", path)


@pytest.mark.usefixtures("stub")
def test_the_command_gets_the_settings_and_its_record_is_read():
    ran = benchmark.run_command(driver.Settings(data="sample", seed=5, device="cpu"))
    given = ["--data", "sample", "--seed", "5", "--device", "cpu", "--out"]
    assert ran.record["given"] == given
    assert ran.seconds > 0
    table = {row.what: row.columns["value"] for row in benchmark.command(ran)}
    assert table["fvu"] == 0.1
    assert table["dead_features"] == 3
    assert table["reported seconds, sae"] == 1.5


@pytest.mark.usefixtures("stub")
def test_a_command_that_fails_is_an_error():
    with pytest.raises(benchmark.CommandError, match=r"--seed 13 .* ended with status 3"):
        benchmark.run_command(driver.Settings(data="sample", seed=13))


# --- All of it ------------------------------------------------------------------------------------


def column(rows: list, title: str) -> dict:
    return {row.what: row.columns[title] for row in rows}


@pytest.mark.usefixtures("stub")
def test_a_tiny_run_of_every_section(monkeypatch, capsys):
    tiny = {"TARGET": 4, "LATENTS": (16, 32), "STEPS": 4, "ROUNDS": 1, "PRODUCT_SIDE": {"cpu": 64}}
    for name, value in tiny.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(driver, "FULL_TRAIN_IMAGES", 3500)
    monkeypatch.setattr(fc, "COMPARED", 8)
    settings = driver.Settings(
        data="sample", device="cpu", sae_latents=16, hidden_units=8, target_actives=(4,)
    )
    result = benchmark.measure_all(settings, repeats=1, reference_features=1)
    shown, tables = capsys.readouterr().out, result.tables
    assert list(tables) == SECTIONS.replace("\n", "|").split("|")
    for section, rows in tables.items():
        assert f"\n{section} " in shown
        assert len({tuple(row.columns) for row in rows}) == 1, section

    seconds = column(tables["stages"], "seconds")
    assert seconds.pop("sum") == pytest.approx(sum(seconds.values()))

    ms = column(tables["SAE step"], "ms")
    products = [ms[name] for name in list(ms)[:5]]
    assert ms["these five products"] == pytest.approx(sum(products))
    parts = [ms[name] for name in list(ms)[5:11]]
    assert ms["whole step"] == pytest.approx(sum(parts) + ms["unaccounted"])

    assert [row.columns["latents"] for row in tables["threads"]] == [16, 32]
    seconds = column(tables["statements"], "seconds")
    own = sum(seconds[name] for name in ("propose", "freeze", "test", "pick", "judge"))
    assert seconds["sum of these five"] == pytest.approx(own)
    features = column(tables["statements"], "features")
    assert (features["propose"], features["neurons"]) == (16, 8)
    others = ("untrained SAE", "random directions", "neurons")
    compared = sum(seconds[name] for name in others)
    assert seconds["sum of comparisons"] == pytest.approx(compared)
    assert seconds["sum"] == pytest.approx(own + seconds["images set aside"] + compared)

    assert tables["page"][0].columns["MiB"] > 0.1
    busy = column(tables["busy"], "to idle")
    assert busy["idle"] == 1
    assert busy["one core busy"] > 0
    assert result.worst <= benchmark.TOLERANCE
    assert result.worst == column(tables["reference"], "difference")["sum"]
    first = {}
    for row in tables["scaling"]:
        first.setdefault((row.what, row.columns["grows"]), row.columns["to linear"])
    assert len(first) == 6
    assert list(first.values()) == pytest.approx([1.0] * 6)


@pytest.mark.parametrize(("worst", "status"), [(0.0, 0), (2e-4, 1)])
def test_main_writes_the_tables_and_says_whether_they_agree(tmp_path, monkeypatch, worst, status):
    def measured(settings, repeats, reference_features):
        assert torch.get_num_threads() == 1
        rows = [benchmark.Row("all", {"seconds": 1.0, "runs": repeats})]
        return benchmark.Result({"stages": rows}, settings.data, worst)

    monkeypatch.setattr(benchmark, "measure_all", measured)
    path = tmp_path / "found.json"
    given = ["--data", "sample", "--json", str(path), "--repeats", "2"]
    assert benchmark.main(given) == status
    record = json.loads(path.read_text())
    assert record["stages"] == [{"what": "all", "seconds": 1.0, "runs": 2}]
    assert record["agrees_with_reference"] is (status == 0)
    assert record["arguments"]["repeats"] == 2
    assert record["data"] == "sample"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("--repeats 0", "--repeats is 0"),
        ("--reference-features 0", "--reference-features is 0"),
        ("--reference-features 513", "--reference-features is 513"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_arguments_that_cannot_be_used(given, match):
    with pytest.raises(driver.InputError, match=match):
        benchmark.parse(given.split())
