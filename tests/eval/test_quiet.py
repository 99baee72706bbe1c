import pytest

from eval._peers import quiet
from eval._peers.quiet import Quiet, Ticks, read_ticks


def write_proc(root, cpu, processes):
    root.mkdir(exist_ok=True)
    (root / "stat").write_text(f"cpu  {' '.join(map(str, cpu))} 0 0\ncpu0 1 2 3\n")
    for pid, (user, system) in processes.items():
        (root / str(pid)).mkdir(exist_ok=True)
        (root / str(pid) / "stat").write_text(f"{pid} (a (b) c) S {' '.join(['0'] * 10)} {user} {system} 0 0\n")


def test_ticks_are_read_from_proc(tmp_path):
    # user nice system idle iowait irq softirq steal
    write_proc(tmp_path, (100, 1, 20, 1000, 50, 2, 3, 4), {7: (30, 5), 8: (10, 1)})
    assert read_ticks([7, 8, 9], tmp_path) == Ticks(total=1180, busy=130, own=46)


def test_foreign_share_is_what_neither_idles_nor_is_ours():
    earlier = Ticks(total=1000, busy=100, own=50)
    later = Ticks(total=1200, busy=100 + 90, own=50 + 68)
    assert later.foreign_share(earlier) == pytest.approx((90 - 68 - quiet.RESOLUTION) / 200)
    assert Ticks(1200, 160, 118).foreign_share(earlier) == 0.0  # readings of less than a tick


class Scripted(Quiet):
    """Foreign shares of the samples as given, without waiting."""

    def __init__(self, shares, **options):
        super().__init__(0.06, list, **options)
        self.shares, self.waits, self.reading = shares, 0, 0

    def ticks(self):
        self.reading += 1
        if self.reading % 2:
            return Ticks(0, 0, 0)
        return Ticks(1000, round(1000 * self.shares[self.reading // 2 - 1]) + quiet.RESOLUTION, 0)

    def wait(self):
        self.waits += 1


def test_an_undisturbed_sample_stands():
    run = Scripted([0.05])
    assert run.sample(lambda: 3.0) == quiet.Sample(3.0, 0.05, 1)
    assert run.waits == 0


def test_a_disturbed_sample_is_taken_again_after_waiting():
    run = Scripted([0.5, 0.2, 0.0])
    values = iter([1.0, 2.0, 3.0])
    assert run.sample(lambda: next(values)) == quiet.Sample(3.0, 0.0, 3)
    assert run.waits == 2


def test_the_least_disturbed_sample_stands_in_the_end_with_its_share():
    run = Scripted([0.5, 0.2, 0.3], retakes=2)
    values = iter([1.0, 2.0, 3.0])
    assert run.sample(lambda: next(values)) == quiet.Sample(2.0, 0.2, 3)


def test_a_busy_process_is_seen_as_foreign_and_our_own_is_not(tmp_path):
    write_proc(tmp_path, (0,) * 8, {7: (0, 0)})
    before = read_ticks([7], tmp_path)
    write_proc(tmp_path, (100, 0, 0, 100, 0, 0, 0, 0), {7: (100, 0)})
    assert read_ticks([7], tmp_path).foreign_share(before) == 0.0
    assert read_ticks([], tmp_path).foreign_share(before) > 0.4


def test_waiting_for_quiet_ends(monkeypatch):
    monkeypatch.setattr(quiet, "WINDOW", 0.001)
    run = Quiet(-1.0, list, patience=0.01)  # never quiet enough
    run.wait()
