//! Fetches and prepares data sets: `cargo run --release -p fulgur-datasets --example fetch -- stamps austen`.
//! Without names it lists them.

use std::cell::Cell;

use fulgur_datasets::fetch::{DataDir, FetchOptions, Progress, Unit};
use fulgur_datasets::sets;

/// Prints every step, and its share in tenths.
#[derive(Default)]
struct Tenths {
    total: Cell<u64>,
    shown: Cell<u64>,
}

impl Progress for Tenths {
    fn begin(&self, step: &str, total: Option<u64>, unit: Unit) {
        self.total.set(total.unwrap_or(0));
        self.shown.set(0);
        eprintln!("{step} ({} {unit:?})", self.total.get());
    }

    fn advance(&self, done: u64) {
        let tenths = (10 * done).checked_div(self.total.get()).unwrap_or(0);
        if tenths > self.shown.replace(tenths) {
            eprintln!("  {tenths}0 %");
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let data = DataDir::from_env();
    if names.is_empty() {
        for set in sets::list(&data) {
            let state = set
                .items
                .map_or("not prepared".to_owned(), |items| format!("{items} items"));
            eprintln!(
                "{:14} {:4} MB  {state:13} {}",
                set.name,
                set.download_bytes / 1_000_000,
                set.description
            );
        }
    }
    let progress = Tenths::default();
    for name in names {
        let options = FetchOptions {
            progress: &progress,
            ..FetchOptions::quiet(data.clone())
        };
        let start = std::time::Instant::now();
        let ready = sets::fetch(&name, &options)?;
        let seconds = start.elapsed().as_secs_f64();
        eprintln!(
            "{}: {} items in {} ({seconds:.1} s)",
            ready.name,
            ready.items,
            ready.path.display()
        );
    }
    Ok(())
}
