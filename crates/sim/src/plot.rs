//! A picture of how figures grow with hosts: SVG, both axes logarithmic, no library.

use std::fmt::Write;

use crate::figures::Row;

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 34.0;
const PLOT_WIDTH: f64 = 370.0;
const PLOT_HEIGHT: f64 = 210.0;
const COLOURS: [&str; 4] = ["#1b6ca8", "#c8553d", "#588b3a", "#7a4fa3"];

struct Series<'a> {
    name: &'a str,
    values: Vec<f64>,
}

/// Two panels: messages and bytes; times.
pub fn svg(rows: &[Row]) -> String {
    let hosts: Vec<_> = rows.iter().map(|row| row.hosts as f64).collect();
    let series = |name, value: fn(&Row) -> u64| Series {
        name,
        values: rows.iter().map(|row| value(row).max(1) as f64).collect(),
    };
    let counts = [series("messages", |row| row.messages), series("bytes", |row| row.bytes)];
    let times = [
        series("cut: all machines, µs", |row| row.cut_us),
        series("closed: all frames in flight, µs", |row| row.closing_us),
        series("bound: 2 round trips + slowest local cut, µs", |row| row.bound_us),
        series("skew, µs", |row| row.skew_us),
    ];
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        2.0 * WIDTH
    );
    panel(&mut svg, 0.0, "Protocol messages and their bytes", &hosts, &counts);
    panel(&mut svg, WIDTH, "Times", &hosts, &times);
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, shift: f64, title: &str, hosts: &[f64], series: &[Series<'_>]) {
    let all = || series.iter().flat_map(|series| series.values.iter().copied());
    let (low_x, high_x) = decades(hosts.iter().copied());
    let (low_y, high_y) = decades(all());
    let x = |value: f64| shift + LEFT + PLOT_WIDTH * (value.log10() - low_x) / (high_x - low_x);
    let y = |value: f64| TOP + PLOT_HEIGHT * (1.0 - (value.log10() - low_y) / (high_y - low_y));
    let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"18\" font-size=\"13\">{title}</text>", shift + LEFT);
    let mut decade = low_x;
    while decade <= high_x {
        let (at, value) = (x(10f64.powf(decade)), 10f64.powf(decade));
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{value}</text>",
            TOP + PLOT_HEIGHT,
            TOP + PLOT_HEIGHT + 15.0,
        );
        decade += 1.0;
    }
    let mut decade = low_y;
    while decade <= high_y {
        let at = y(10f64.powf(decade));
        let _ = writeln!(
            svg,
            "<line x1=\"{:.1}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            shift + LEFT,
            shift + LEFT + PLOT_WIDTH,
            shift + LEFT - 5.0,
            at + 4.0,
            short(10f64.powf(decade)),
        );
        decade += 1.0;
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">hosts</text>",
        shift + LEFT + PLOT_WIDTH / 2.0,
        TOP + PLOT_HEIGHT + 30.0,
    );
    for (number, Series { name, values }) in series.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let points: Vec<_> = hosts
            .iter()
            .zip(values)
            .map(|(&host, &value)| format!("{:.1},{:.1}", x(host), y(value)))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{name}</text>",
            points.join(" "),
            shift + LEFT + 8.0,
            TOP + 14.0 + 14.0 * number as f64,
        );
    }
}

/// The powers of ten around the values.
fn decades(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let low = values.clone().fold(f64::INFINITY, f64::min).log10().floor();
    let high = values.fold(0.0, f64::max).log10().ceil();
    (low, high.max(low + 1.0))
}

fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{} M", v / 1e6),
        v if v >= 1e3 => format!("{} k", v / 1e3),
        v => format!("{v}"),
    }
}
