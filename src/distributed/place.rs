//! Which rank a process is: what launchers tell by environment variables.
//!
//! | launcher | rank | ranks | rank on its host |
//! |---|---|---|---|
//! | `fulgur launch`, torchrun and others | `RANK` | `WORLD_SIZE` | `LOCAL_RANK` |
//! | Open MPI's `mpirun` | `OMPI_COMM_WORLD_RANK` | `OMPI_COMM_WORLD_SIZE` | `OMPI_COMM_WORLD_LOCAL_RANK` |
//! | Slurm's `srun` | `SLURM_PROCID` | `SLURM_NTASKS` | `SLURM_LOCALID` |
//!
//! Ranks meet at `MASTER_ADDR` and `MASTER_PORT`, where rank 0 listens.

/// Where ranks meet, if nobody says otherwise.
const ADDRESS: &str = "127.0.0.1";
const PORT: u16 = 29_500;

/// Names of rank, ranks and rank on its host, by launcher.
const LAUNCHERS: [[&str; 3]; 3] = [
    ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
    [
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ],
    ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
];

/// One process of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its rank.
    pub rank: usize,
    /// Ranks of the job.
    pub world: usize,
    /// Its number on its host.
    pub local: usize,
    /// The host of rank 0.
    pub address: String,
    /// Where rank 0 listens.
    pub port: u16,
    /// A word that all processes of a job share, so that those of another one are turned away.
    pub job: String,
}

impl Place {
    /// Of this process; none if no launcher started it.
    ///
    /// # Errors
    /// A variable is missing or is no number that makes sense; it is named.
    pub fn of_process() -> Result<Option<Self>, String> {
        Self::of(|name| std::env::var(name).ok())
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, String> {
        let number = |name: &str| -> Result<Option<usize>, String> {
            match variable(name) {
                None => Ok(None),
                Some(text) => match text.parse() {
                    Ok(number) => Ok(Some(number)),
                    Err(_) => Err(format!("{name} is `{text}`, expected a number")),
                },
            }
        };
        for [rank_name, world_name, local_name] in LAUNCHERS {
            // Batch scripts have a rank without being one of several.
            let (rank, world) = match (number(rank_name)?, number(world_name)?) {
                (Some(rank), Some(world)) => (rank, world),
                (None, None) => continue,
                (Some(_), None) if rank_name == LAUNCHERS[0][0] => {
                    return Err(format!("{world_name} is missing, expected the number of ranks"));
                }
                (None, Some(_)) if rank_name == LAUNCHERS[0][0] => {
                    return Err(format!(
                        "{rank_name} is missing, expected the rank of this process"
                    ));
                }
                _ => continue,
            };
            if world == 0 || rank >= world {
                return Err(format!(
                    "{rank_name} is {rank}, expected less than {world}, {world_name}"
                ));
            }
            let port = match variable("MASTER_PORT") {
                None => PORT,
                Some(text) => match text.parse() {
                    Ok(port) => port,
                    Err(_) => return Err(format!("MASTER_PORT is `{text}`, expected a port, 1 to 65535")),
                },
            };
            return Ok(Some(Self {
                rank,
                world,
                local: number(local_name)?.unwrap_or(rank),
                address: variable("MASTER_ADDR").unwrap_or_else(|| ADDRESS.to_owned()),
                port,
                job: variable("FULGUR_JOB").unwrap_or_default(),
            }));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Place>, String> {
        Place::of(|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn launchers_are_understood() {
        assert_eq!(of(&[]), Ok(None));
        let place = Place {
            rank: 3,
            world: 4,
            local: 1,
            address: "10.0.0.1".into(),
            port: 1234,
            job: String::new(),
        };
        let master = [("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "1234")];
        for [rank, world, local] in LAUNCHERS {
            let mut variables = vec![(rank, "3"), (world, "4"), (local, "1")];
            variables.extend(master);
            assert_eq!(of(&variables), Ok(Some(place.clone())), "{rank}");
        }
        let bare = of(&[("RANK", "1"), ("WORLD_SIZE", "2")]).unwrap().unwrap();
        assert_eq!((bare.local, bare.address.as_str(), bare.port), (1, ADDRESS, PORT));
        // A batch script of Slurm knows how many tasks there will be, and is none of them.
        assert_eq!(of(&[("SLURM_NTASKS", "4")]), Ok(None));
        for (variables, words) in [
            (&[("RANK", "1")][..], "WORLD_SIZE is missing"),
            (&[("WORLD_SIZE", "2")], "RANK is missing"),
            (
                &[("RANK", "x"), ("WORLD_SIZE", "2")],
                "RANK is `x`, expected a number",
            ),
            (
                &[("RANK", "2"), ("WORLD_SIZE", "2")],
                "RANK is 2, expected less than 2",
            ),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "70000")],
                "MASTER_PORT is `70000`",
            ),
        ] {
            let line = of(variables).unwrap_err();
            assert!(line.contains(words), "{line}");
        }
    }
}
