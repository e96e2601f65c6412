//! The result of `bench dirty` as a picture.

use std::{
    fs::{self, File, OpenOptions},
    path::Path,
};

use anyhow::Context as _;
use plotters::prelude::*;

use super::{
    case::Method,
    report::{Report, Row, percent},
};

fn colour(method: Method) -> RGBColor {
    match method {
        Method::SoftDirty => RGBColor(0x7b, 0x5a, 0xa6),
        Method::WpBlocking => RGBColor(0xd0, 0x62, 0x24),
        Method::WpAsync => RGBColor(0x1f, 0x77, 0xb4),
        Method::KvmLog => RGBColor(0x2c, 0x8c, 0x3c),
        Method::KvmRing => RGBColor(0xb8, 0x2c, 0x5a),
    }
}

/// Finds out whether there can be a picture, before all is measured. Leaves everything as it was.
pub(super) fn try_path(path: &Path) -> anyhow::Result<()> {
    let failed = || format!("--plot: opening {}", path.display());
    if path.exists() {
        OpenOptions::new().write(true).open(path).with_context(failed)?;
    } else {
        File::create_new(path).and_then(|_| fs::remove_file(path)).with_context(failed)?;
    }
    Ok(())
}

/// One diagram for each share written: milliseconds of a cycle over the size of the memory, for
/// each method; *raw* in thin lines.
pub(super) fn draw(report: &Report, path: &Path) -> anyhow::Result<()> {
    let failed = |error: &dyn std::fmt::Display| anyhow::anyhow!("{error}");
    let shares = report.shares();
    let root = SVGBackend::new(
        path,
        (480 * shares.len().min(2) as u32, 380 * shares.len().div_ceil(2) as u32),
    )
    .into_drawing_area();
    root.fill(&WHITE).map_err(|error| failed(&error))?;
    let areas = root.split_evenly((shares.len().div_ceil(2), shares.len().min(2)));
    for (area, share) in areas.iter().zip(&shares) {
        diagram(report, area, *share).map_err(|error| failed(&error))?;
    }
    root.present().map_err(|error| failed(&error))?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn diagram(report: &Report, area: &Area<'_>, share: f64) -> Result<(), Box<dyn std::error::Error>> {
    let of = |rows: &[Row], method| -> Vec<(f64, f64)> {
        let rows = rows.iter().filter(|row| row.method == method && row.dirty_share == share);
        // What took no time that could be measured has no place on a logarithmic axis.
        rows.map(|row| (row.bytes as f64 / f64::from(1 << 20), row.cycle_ms.max(1e-3))).collect()
    };
    let methods = report.methods();
    let all: Vec<(f64, f64)> = methods
        .iter()
        .flat_map(|method| [of(&report.rows, *method), of(&report.references, *method)].concat())
        .collect();
    let bounds = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let values = all.iter().map(of);
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        (low / 1.3)..(high * 1.3)
    };
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{} of the pages written", percent(share)), ("sans-serif", 16))
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(bounds(&|p| p.0).log_scale(), bounds(&|p| p.1).log_scale())?;
    chart.configure_mesh().x_desc("memory, MiB").y_desc("writes and harvest, ms").draw()?;
    for method in methods {
        let colour = colour(method);
        let ours = of(&report.rows, method);
        chart
            .draw_series(LineSeries::new(ours, colour.stroke_width(2)).point_size(3))?
            .label(method.to_string())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        chart.draw_series(LineSeries::new(of(&report.references, method), colour.mix(0.5)))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}
