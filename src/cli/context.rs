//! What every command is given besides its own arguments.

use std::io::{self, IsTerminal, Write};

use candle_core::Device;

use super::Global;
use super::interrupt::Interrupt;
use super::progress::{Progress, Style, Unit};
use crate::device::DeviceChoice;

/// The surroundings of a command.
pub(super) struct Context {
    style: Style,
    device: DeviceChoice,
    /// Whether the answer is to be one JSON object.
    pub(super) json: bool,
    /// Whether the user asked to stop.
    pub(super) interrupt: Interrupt,
}

impl Context {
    /// Installs the Ctrl-C handler and decides how progress is shown.
    pub(super) fn new(global: &Global) -> anyhow::Result<Self> {
        let style = match global.quiet {
            true => Style::Silent,
            false if io::stderr().is_terminal() => Style::Bar,
            false => Style::Lines,
        };
        Ok(Self {
            style,
            device: global.device,
            json: global.json,
            interrupt: Interrupt::install()?,
        })
    }

    /// Opens the device that the user chose, and says so where that is not what `auto` hoped for.
    pub(super) fn open_device(&self) -> anyhow::Result<Device> {
        let opened = self.device.open()?;
        if let Some(note) = opened.note {
            self.note(&note);
        }
        Ok(opened.device)
    }

    /// As [`Self::open_device`], for rank number `local` of this host: the GPU of that number, unless one was chosen by its number.
    pub(super) fn open_local_device(&self, local: usize) -> anyhow::Result<Device> {
        match self.device {
            DeviceChoice::Auto if local > 0 && cfg!(feature = "cuda") => {
                match DeviceChoice::Cuda(local).open() {
                    Ok(opened) => Ok(opened.device),
                    Err(_) => self.open_device(),
                }
            }
            _ => self.open_device(),
        }
    }

    /// Progress of a piece of work, on standard error.
    pub(super) fn progress(&self, label: &str, unit: Unit) -> Progress {
        Progress::new(self.style, label, unit)
    }

    /// One line for the user on standard error, unless `-q`.
    pub(super) fn note(&self, line: &str) {
        if self.style != Style::Silent {
            // A closed standard error must not end the work.
            writeln!(io::stderr(), "{line}").ok();
        }
    }
}
