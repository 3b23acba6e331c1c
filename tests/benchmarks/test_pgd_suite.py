"""Every row of the PGD suite at its smallest size: ours runs, and every peer that is there computes the same."""

import torch

from fastrobust.benchmarks import harness, pgd
from fastrobust.benchmarks.case import Context


def test_the_suite_runs_and_agrees_with_its_peers():
    done = harness.run([pgd.SUITE], Context(level="smoke"))
    assert {row.work for row in done.rows} == {
        "pgd_step",
        "pgd_step bf16",
        "fosc",
        "pgd_step_fosc",
        "atas_step",
        "random_start",
        "cross_entropy",
        "margin_loss",
        "dlr_loss",
        "kl_divergence",
        "PGD-10",
    }
    for row in done.rows:
        assert row.ours.status in (harness.OK, harness.SKIPPED), (row.work, row.ours.reason)
        if row.ours.status == harness.SKIPPED:
            assert "scikit-learn" in row.ours.reason
            continue
        for peer in row.peers:
            assert peer.status in (harness.OK, harness.SKIPPED), (row.work, row.axes, peer.name, peer.reason)
        assert row.peers[0].status == harness.OK  # eager torch is always there
        assert row.floor is not None and row.floor.fraction.median > 0


def test_sizes_reach_from_12_thousand_elements_to_77_megabytes():
    full = pgd.shapes(Context(level="full"))
    sizes = [torch.Size(shape).numel() for shape in full]
    assert min(sizes) == 12_544
    assert max(sizes) * 4 == 77_070_336
    assert set(pgd.shapes(Context(level="default"))) <= set(full)


def test_draws_of_another_distribution_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, 12_544, generator=generator) - 0.5
    other = torch.randn(12_544, generator=generator) * uniform.std()
    tolerance = 20 * 0.5 / 12_544**0.5
    assert pgd.same_distribution(uniform[0], uniform[1], tolerance).agrees
    assert not pgd.same_distribution(uniform[0], other, 0.05).agrees
