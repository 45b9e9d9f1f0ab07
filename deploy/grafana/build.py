"""Build the dashboard: `python deploy/grafana/build.py` writes guard.json anew. Needs the extra `dashboards`."""

from __future__ import annotations

import string
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

FILE = Path(__file__).parent / "guard.json"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
#: Verdicts keep their colour everywhere.
COLOURS = {
    "clean": "#5794F2",
    "poisoned": "#E02F44",
    "bypassed": "#FF9830",
    "rejected": "#B877D9",
    "failed": "#8F3BB8",
}
_ALL = '{model=~"$model"}'
_RATE = "[$__rate_interval]"
#: Width and height of panels; a row has 24 columns.
_WIDE, _NARROW, _HIGH, _LOW = 12, 8, 8, 4


def query(expression: str, legend: str = "__auto") -> prometheus.Dataquery:
    """Return one expression of a panel."""
    return prometheus.Dataquery().expr(expression).legend_format(legend).datasource(SOURCE)


def lines(
    title: str, about: str, *queries: prometheus.Dataquery, unit: str = "short", width: int = _WIDE
) -> timeseries.Panel:
    """Return lines over time."""
    panel = timeseries.Panel().title(title).description(about).datasource(SOURCE).unit(unit).span(width).height(_HIGH)
    panel = panel.line_width(1).fill_opacity(8).show_points(common.VisibilityMode.NEVER).min(0)
    panel = panel.tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    for letter, one in zip(string.ascii_uppercase, queries, strict=False):
        panel = panel.with_target(one.ref_id(letter))
    return panel


def stacked(panel: timeseries.Panel) -> timeseries.Panel:
    """Return a panel of lines with its series on top of each other."""
    return panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL)).fill_opacity(40)


def coloured(panel: timeseries.Panel) -> timeseries.Panel:
    """Return a panel of lines whose series are verdicts, each in its colour."""
    for verdict, colour in COLOURS.items():
        fixed = models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
        panel = panel.override_by_name(verdict, [fixed])
    return panel


def number(
    title: str, about: str, *queries: prometheus.Dataquery, unit: str = "short", bad_from: float | None = None
) -> stat.Panel:
    """Return the latest value as a number; red from `bad_from` on."""
    steps = [models.Threshold(color="green", value=None)]
    if bad_from is not None:
        steps.append(models.Threshold(color="red", value=bad_from))
    panel = stat.Panel().title(title).description(about).datasource(SOURCE).unit(unit).span(4).height(_LOW)
    panel = panel.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    panel = panel.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
    panel = panel.graph_mode(common.BigValueGraphMode.AREA)
    for letter, one in zip(string.ascii_uppercase, queries, strict=False):
        panel = panel.with_target(one.ref_id(letter))
    return panel


def estimated(title: str, about: str, metric: str, unit: str = "percentunit") -> timeseries.Panel:
    """Return an estimate over time, between the ends of its interval."""
    ends = (
        (metric, "{{model}}"),
        (f"{metric}_lower", "{{model}}, lower end"),
        (f"{metric}_upper", "{{model}}, upper end"),
    )
    queries = [query(f"{name}{_ALL}", legend) for name, legend in ends]
    return lines(title, f"{about} Estimated from the answers, 95 % confidence.", *queries, unit=unit, width=_NARROW)


def p_values() -> heatmap.Panel:
    """Return the distribution of p-values over time."""
    buckets = query(f"sum by (le) (rate(guard_p_value_bucket{_ALL}{_RATE}))", "{{le}}")
    panel = heatmap.Panel().title("P-values").datasource(SOURCE).span(_WIDE).height(_HIGH)
    panel = panel.description(
        "Requests per second by p-value. Clean traffic fills the bins from 0.1 on evenly; an attack is a bright line "
        "at the bottom, and traffic unlike the guard's clean images sinks as a whole."
    )
    colour = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Blues").steps(64)
    return panel.color(colour).with_target(buckets.format(prometheus_models.PromQueryFormat.HEATMAP).ref_id("A"))


def build() -> str:
    """Return the dashboard as JSON."""
    verdicts = f"guard_verdicts_total{_ALL}"
    stages = f"guard_stage_duration_seconds_bucket{_ALL}"
    guards_part = f'sum(rate(guard_stage_duration_seconds_sum{{model=~"$model", stage="guard"}}{_RATE}))'
    both_parts = f"sum(rate(guard_stage_duration_seconds_sum{_ALL}{_RATE}))"
    board = (
        dashboard.Dashboard("Guard")
        .uid("guard")
        .description(
            "What the guard does with the requests of suspect image classifiers. Built by deploy/grafana/build.py."
        )
        .tags(["guard"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("model")
            .label("Model")
            .datasource(SOURCE)
            .query("label_values(guard_verdicts_total, model)")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .multi(True)
            .all_value(".*")
        )
    )
    panels = [
        number(
            "Alerts firing",
            "Of deploy/prometheus/alerts.yml; docs/operations.md says what to do.",
            query('count(ALERTS{alertname=~"Guard.*", alertstate="firing"}) or vector(0)'),
            bad_from=1,
        ),
        number("Requests", "Per second.", query(f"sum(rate({verdicts}[5m]))"), unit="reqps"),
        number(
            "Flagged",
            "Share of scored requests in the last five minutes.",
            query(f"max(guard:flagged:ratio_rate5m{_ALL})"),
            unit="percentunit",
        ),
        number(
            "Bypassed",
            "Requests of the last hour that were answered without being scored.",
            query(f"sum(increase(guard_bypassed_total{_ALL}[1h]))"),
            bad_from=1,
        ),
        number(
            "Waiting longest",
            "Age of the oldest pending input; 0 if none waits.",
            query(f"max(time() - guard_queue_oldest_item_timestamp_seconds{_ALL}) or vector(0)"),
            unit="s",
            bad_from=4 * 3600,
        ),
        number(
            "Up",
            "Servers, review pages and retrainers that answer, of all that are known; and whether the queue does.",
            query('sum(up{job=~"guard-.*"}) / count(up{job=~"guard-.*"})', "processes"),
            query("min(guard_queue_up) or vector(1)", "queue"),
            unit="percentunit",
        ),
        coloured(
            stacked(
                lines(
                    "Verdicts",
                    "Requests per second; their sum is everything that was received.",
                    query(f"sum by (verdict) (rate({verdicts}{_RATE}))", "{{verdict}}"),
                    unit="reqps",
                )
            )
        ),
        lines(
            "Share flagged",
            "Share of scored requests that were flagged. Clean traffic alone stays at the requested rate.",
            query(f"guard:flagged:ratio_rate5m{_ALL}", "{{model}}, 5 minutes"),
            query(f"guard:flagged:ratio_rate1h{_ALL}", "{{model}}, 1 hour"),
            unit="percentunit",
        ),
        p_values(),
        lines(
            "Drift of clean traffic",
            "Low p-values among unflagged requests, over an hour, against the calibration: 1 = as calibrated.",
            query(f"guard_clean_drift{_ALL}", "{{model}}"),
        ),
        stacked(
            lines(
                "Detectors that fired",
                "Flagged requests per second in which a detector by itself was surprised enough.",
                query(f"sum by (detector) (rate(guard_detector_fired_total{_ALL}{_RATE}))", "{{detector}}"),
                unit="reqps",
            )
        ),
        lines(
            "Errors, bypasses, early verdicts",
            "Requests per second answered with an error, by status, and not scored, by reason; inputs judged by an "
            "early verdict, and those for which even the shallowest one allowed came late.",
            query(f'sum by (code) (rate(guard_requests_total{{model=~"$model", code=~"[45].."}}{_RATE}))', "{{code}}"),
            query(f"sum by (reason) (rate(guard_bypassed_total{_ALL}{_RATE}))", "bypassed: {{reason}}"),
            query(f"sum(rate(guard_shallow_total{_ALL}{_RATE}))", "early verdict"),
            query(f"sum(rate(guard_depth_floor_total{_ALL}{_RATE}))", "late at the floor"),
            unit="reqps",
        ),
        lines(
            "Seconds per batch",
            "`handler` is the user's own part, `guard` what the guard adds.",
            query(f"histogram_quantile(0.5, sum by (le, stage) (rate({stages}{_RATE})))", "{{stage}}, median"),
            query(f"histogram_quantile(0.99, sum by (le, stage) (rate({stages}{_RATE})))", "{{stage}}, 99 %"),
            unit="s",
        ),
        lines(
            "Guard's share of the worker's time",
            "Of the time that handlers and guard take together.",
            query(f"{guards_part} / {both_parts}", "guard"),
            unit="percentunit",
        ),
        stacked(
            lines(
                "Queue",
                "Flagged inputs by state.",
                query(f"sum by (state) (guard_queue_items{_ALL})", "{{state}}"),
                width=_NARROW,
            )
        ),
        lines(
            "On the way to the queue",
            "Flagged requests per second that the queue took, and that it did not take.",
            query(f"sum(rate(guard_queued_total{_ALL}{_RATE}))", "queued"),
            query(f"sum by (reason) (rate(guard_shed_total{_ALL}{_RATE}))", "shed: {{reason}}"),
            width=_NARROW,
        ),
        lines(
            "Reviewers' answers",
            "Per hour, and how many of them took the place of one that said something else.",
            query("sum by (decision) (increase(guard_review_decisions_total[1h]))", "{{decision}}"),
            query("sum(increase(guard_review_overturned_total[1h]))", "overturned"),
            width=_NARROW,
        ),
        lines(
            "Retrainings",
            "All so far.",
            query(f"sum by (outcome) (guard_retrain_runs_total{_ALL})", "{{outcome}}"),
            width=_NARROW,
        ),
        lines(
            "Bundles in use",
            "1 per model and bundle.",
            query(f"max by (model, digest) (guard_bundle_info{_ALL}) == 1", "{{model}} {{digest}}"),
            width=_NARROW,
        ),
        lines(
            "Changes of bundle",
            "Per hour: taken, and refused because it was damaged or for another model.",
            query(f"sum by (outcome) (increase(guard_bundle_swaps_total{_ALL}[1h]))", "{{outcome}}"),
            width=_NARROW,
        ),
        lines(
            "Batches",
            "1 if the requests of a batch share a call of the handler, 0 if one by one; checks per hour by outcome.",
            query(f"min by (model) (guard_batching{_ALL})", "{{model}} together"),
            query(f"sum by (outcome) (increase(guard_batch_checks_total{_ALL}[1h]))", "checks: {{outcome}}"),
            width=_NARROW,
        ),
        estimated(
            "Detection rate",
            "Share of the poisoned inputs of the last 7 days that were flagged.",
            "guard_detection_rate",
        ),
        estimated(
            "Let through", "Poisoned inputs of the last 7 days that were not flagged.", "guard_let_through", "short"
        ),
        estimated(
            "Realised false-positive rate",
            "Share of the clean inputs of the last 7 days that were flagged.",
            "guard_realised_false_positive_rate",
        ),
        estimated("Precision", "Share of the flagged inputs of the last 7 days that are poisoned.", "guard_precision"),
        estimated(
            "Poisoned share", "Share of all inputs of the last 7 days that are poisoned.", "guard_poisoned_share"
        ),
        lines(
            "Found among the audits",
            "Poisoned inputs that were not flagged, of all time: each is an alert.",
            query(f"guard_missed_poisoned{_ALL}", "{{model}}"),
            width=_NARROW,
        ),
        lines(
            "Audits",
            "Unflagged requests per hour that the queue took as audits, and that it did not take.",
            query(f"sum(increase(guard_audited_total{_ALL}[1h]))", "taken"),
            query(f"sum by (reason) (increase(guard_audits_shed_total{_ALL}[1h]))", "shed: {{reason}}"),
            width=_NARROW,
        ),
    ]
    for number_of, panel in enumerate(panels, start=1):
        board = board.with_panel(panel.id(number_of))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(build(), encoding="utf-8")
    sys.stdout.write(f"{FILE}\n")
