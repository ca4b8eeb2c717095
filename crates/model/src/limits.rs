//! How much a file may claim before it is believed.

/// Upper bounds on what a reader accepts, checked before anything of that size is allocated.
///
/// The defaults let every published checkpoint of the supported families through. A service that
/// reads files of strangers lowers them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a JSON file (`config.json`, `tokenizer.json`, a shard index) or a vocabulary.
    pub text_file_bytes: u64,
    /// Bytes of the JSON header of one safetensors file.
    pub header_bytes: u64,
    /// Tensors in one safetensors file.
    pub tensors: usize,
    /// Bytes of a tensor's name.
    pub name_bytes: usize,
    /// Dimensions of a tensor.
    pub rank: usize,
    /// Bytes of one tensor as stored.
    pub tensor_bytes: u64,
    /// Files of a sharded checkpoint.
    pub shards: usize,
    /// Parameters that a config may ask for.
    pub parameters: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            text_file_bytes: 128 << 20,
            header_bytes: 100_000_000,
            tensors: 1 << 20,
            name_bytes: 1024,
            rank: 8,
            tensor_bytes: 64 << 30,
            shards: 4096,
            parameters: 1 << 41,
        }
    }
}
