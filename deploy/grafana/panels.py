"""Queries, panels and variables, in the style that all dashboards share."""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

Panel = timeseries.Panel | stat.Panel | heatmap.Panel
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WHERE = 'instance=~"$instance"'
WIDTH = 24
"""Width of a dashboard, in columns."""


# -- queries ---------------------------------------------------------------------------------------------


def gauge(metric: str, *, by: str = "") -> str:
    """The value of a gauge, summed over the selected instances."""
    return f"sum{_by(by)} ({metric}{_selector('')})"


def rate(metric: str, *, by: str = "", labels: str = "") -> str:
    """Events per second of a counter, summed over the selected instances."""
    return f"sum{_by(by)} (rate({metric}{_selector(labels)}[$__rate_interval]))"


def quantile(q: float, histogram: str, *, by: str = "") -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', by=', '.join(filter(None, ('le', by))))})"


def mean(histogram: str, *, by: str = "") -> str:
    """The mean of a histogram."""
    return f"{rate(f'{histogram}_sum', by=by)} / {rate(f'{histogram}_count', by=by)}"


def share(part: str, whole: str) -> str:
    """One rate divided by another; no data where the other is 0."""
    return f"{part} / ({whole} > 0)"


def share_by(counter: str, label: str) -> str:
    """The share of a counter's rate for each value of a label."""
    return f"{rate(counter, by=label)} / on () group_left () ({rate(counter)} > 0)"


def _selector(labels: str) -> str:
    return "{" + ", ".join(filter(None, (WHERE, labels))) + "}"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


# -- panels ----------------------------------------------------------------------------------------------


def time_series(
    title: str,
    description: str,
    unit: str,
    queries: Mapping[str, str],
    *,
    width: int = 12,
    stacked: bool = False,
    log: bool = False,
    top: float | None = None,
) -> timeseries.Panel:
    """A panel of curves over time.

    Args:
        title: title of the panel.
        description: what the panel shows and how to read it.
        unit: Grafana's name of the unit.
        queries: queries by the legend of their curves; a legend may name labels as ``{{label}}``.
        width: width in columns, of :data:`WIDTH`.
        stacked: stack the curves.
        log: use a logarithmic axis.
        top: upper end of the axis.
    """
    panel = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(60 if stacked else 5)
        .show_points(common_models.VisibilityMode.NEVER)
        .axis_soft_min(0)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    if log:
        panel.scale_distribution(common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10))
    if top is not None:
        panel.max(top)
    _fill(panel, title, description, unit, width, 8)
    for index, (legend, expression) in enumerate(queries.items()):
        panel.with_target(_query(expression, legend, index))
    return panel


def single_value(title: str, description: str, unit: str, expression: str) -> stat.Panel:
    """A panel of the latest value, over its curve."""
    panel = (
        stat.Panel()
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .color_mode(common_models.BigValueColorMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    _fill(panel, title, description, unit, 4, 5)
    return panel.with_target(_query(expression, title, 0))


def heat_map(title: str, description: str, unit: str, histogram: str) -> heatmap.Panel:
    """A panel of a histogram over time: the darker a cell, the more observations in its bucket."""
    panel = (
        heatmap.Panel()
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Blues").steps(64))
        .cell_values(heatmap.CellValues().unit("short"))
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .show_legend()
    )
    _fill(panel, title, description, unit, 12, 8)
    expression = f"sum by (le) (increase({histogram}_bucket{_selector('')}[$__rate_interval]))"
    return panel.with_target(_query(expression, "{{le}}", 0, prometheus_models.PromQueryFormat.HEATMAP))


def _fill(panel: Panel, title: str, description: str, unit: str, width: int, height: int) -> None:
    panel.title(title).description(description).unit(unit).datasource(SOURCE).span(width).height(height)


def _query(
    expression: str,
    legend: str,
    index: int,
    query_format: prometheus_models.PromQueryFormat = prometheus_models.PromQueryFormat.TIME_SERIES,
) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .expr(expression)
        .legend_format(legend)
        .range()
        .format(query_format)
        .ref_id(chr(ord("A") + index))
        .datasource(SOURCE)
    )


# -- a dashboard -----------------------------------------------------------------------------------------


def build_dashboard(uid: str, title: str, description: str, rows: Mapping[str, list[Panel]]) -> dashboard.Dashboard:
    """A dashboard with the variables `model` and `instance`. ``rows`` holds the panels of each row, left to right."""
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["slr"])
        .readonly()
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("model", "Model", "label_values(slr_build_info, model)"))
        # The other metrics have no label `model`: a model is selected by the instances that serve it.
        .with_variable(_variable("instance", "Instance", 'label_values(slr_build_info{model=~"$model"}, instance)'))
        .link(dashboard.DashboardLink("SLR").type(models.DashboardLinkType.DASHBOARDS).tags(["slr"]).keep_time(True))
    )
    for name, panels in rows.items():
        built.with_row(dashboard.Row(name))
        for panel in panels:
            built.with_panel(panel)
    return built


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .include_all(True)
        .multi(True)
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )
