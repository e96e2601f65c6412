//! The result of `bench migrate` as a picture.

use std::{fs::File, io::Write as _};

use plotters::prelude::*;

use super::report::{Report, Row};

/// Pixels of a bar and the space around it.
const BAR: u32 = 22;
const LABELS: u32 = 330;
const WIDTH: u32 = 1200;

/// A bar of figures of one kind.
struct Figure {
    caption: &'static str,
    of: fn(&Row) -> Option<f64>,
}

const FIGURES: [Figure; 3] = [
    Figure { caption: "MB/s", of: |row| Some(row.mb_per_s) },
    Figure { caption: "downtime, ms", of: |row| row.downtime_ms },
    Figure { caption: "p99 of faults, us", of: |row| row.p99_us },
];

fn colour(row: &Row) -> RGBColor {
    if row.mode.is_some() { RGBColor(0x1f, 0x77, 0xb4) } else { RGBColor(0x88, 0x88, 0x88) }
}

/// A bar for each row and figure: throughput, downtime, and the 99th percentile of the waits.
pub(super) fn draw(report: &Report, mut file: File) -> anyhow::Result<()> {
    let mut text = String::new();
    bars(&report.rows, &mut text).map_err(|error| anyhow::anyhow!("{error}"))?;
    file.write_all(text.as_bytes())?;
    Ok(())
}

fn bars(rows: &[Row], text: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let height = BAR * (rows.len() as u32 + 2);
    let root = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let font = ("sans-serif", 13).into_font();
    let line = |number: usize| (BAR * (number as u32 + 1)) as i32;
    for (number, row) in rows.iter().enumerate() {
        let at = (8, line(number) + 4);
        root.draw(&Text::new(row.label(), at, font.clone()))?;
    }
    let width = (WIDTH - LABELS) / FIGURES.len() as u32;
    // The figure itself stands at the end of its bar.
    let longest = f64::from(width) - 90.0;
    for (place, Figure { caption, of }) in FIGURES.iter().enumerate() {
        let left = (LABELS + place as u32 * width) as i32;
        root.draw(&Text::new(*caption, (left, 4), font.clone()))?;
        let most = rows.iter().filter_map(of).fold(0.0, f64::max);
        for (number, row) in rows.iter().enumerate() {
            let Some(value) = of(row) else { continue };
            let length = if most > 0.0 { (value / most * longest) as i32 } else { 0 };
            let (top, right) = (line(number), left + length.max(1));
            let bar = [(left, top + 3), (right, top + BAR as i32 - 4)];
            root.draw(&Rectangle::new(bar, colour(row).filled()))?;
            let places = usize::from(value < 100.0);
            let figure = Text::new(format!("{value:.places$}"), (right + 4, top + 4), font.clone());
            root.draw(&figure)?;
        }
    }
    root.present()?;
    Ok(())
}
