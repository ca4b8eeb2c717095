#![no_main]

use lapidary_kernels::PytorchFile;
use libfuzzer_sys::fuzz_target;
use std::io::{Cursor, Write};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

// The archive is made here, so that what is mutated is the pickle and not checksums around it.
fuzz_target!(|pickle: &[u8]| {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in [("a/data.pkl", pickle), ("a/data/0", &[0; 4096])] {
        writer.start_file(name, options).expect("a name");
        writer.write_all(bytes).expect("memory");
    }
    let archive = writer.finish().expect("memory");
    let Ok(mut file) = PytorchFile::open(archive) else {
        return;
    };
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    for name in names {
        let shape = file.shape(&name).expect("a name of the file").to_vec();
        if let Ok(tensor) = file.tensor(&name) {
            assert_eq!(tensor.dims(), shape);
        }
    }
});
