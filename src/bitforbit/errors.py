"""Every error that bitforbit raises on purpose: one class per cause.

A message says what was expected, what was found and what to do, and names the file or the tensor.
"""


class BitforbitError(Exception):
    """Base of every error raised on purpose."""


# --- what the caller asked for -------------------------------------------------------------------------------


class UsageError(BitforbitError, ValueError):
    """An argument that cannot be carried out."""


class SourceNotFoundError(UsageError):
    """The source path does not exist, or is neither a file nor a directory of the expected kind."""


class DestinationExistsError(UsageError):
    """The destination already holds something and ``overwrite`` was not given."""


class DestinationInsideSourceError(UsageError):
    """Source and destination overlap, so writing would touch the source."""


class AlreadyCompressedError(UsageError):
    """The source is a compressed model (bitforbit or DFloat11)."""


class NotCompressedError(UsageError):
    """The source of a decompression or verification is not a compressed model."""


class PickleRefusedError(UsageError):
    """The weights are Python pickles (.bin, .pt, .pth, .ckpt, .pkl), which run code when read."""


class GgufRefusedError(UsageError):
    """The weights are a GGUF file, a format of already quantized weights."""


class SliceIndexError(UsageError, IndexError):
    """An index outside a tensor of which part was to be read."""


class UnsupportedDtypeError(UsageError):
    """An array of a dtype that cannot be compressed was handed over."""


class UnknownIsaError(UsageError):
    """``BITFORBIT_ISA`` or ``force`` names an instruction set that is unknown or that this CPU lacks."""


class CompressedParameterError(UsageError):
    """A compressed parameter was to be changed, trained, cast or found where it is not."""


class KvSpecError(UsageError):
    """Settings of a quantized key-value cache that do not exist, or that do not fit the model."""


class KvCacheError(UsageError):
    """A quantized key-value cache was used in a way that it cannot be."""


class NonFiniteKeysError(BitforbitError, ValueError):
    """Keys or values with NaN or infinity were to be quantized."""


class AttentionError(UsageError):
    """Shapes, patterns or masks that an attention function cannot work with."""


class IoModelError(UsageError):
    """An algorithm that cannot run in the fast memory given, or sizes that make no sense."""


class PlanError(UsageError):
    """A model, a GPU or a way to split one over the other that cannot be planned for."""


class MissingDependencyError(BitforbitError, ImportError):
    """An optional package is needed for what was asked."""


class NoGenerationHeadError(UsageError):
    """The model is not one that continues text."""


class NoTokenizerError(UsageError):
    """The model directory holds no tokenizer, or none that can be loaded, and text was asked for."""


class PromptTooLongError(UsageError):
    """The prompt leaves no room for an answer in the model's context."""


class ModelLoadError(BitforbitError):
    """transformers could not make a model, or a complete one, of the directory."""


class WorkerError(BitforbitError):
    """A process that measured part of a benchmark ended without a result."""


# --- files that are damaged or hostile -----------------------------------------------------------------------


class FormatError(BitforbitError, ValueError):
    """A file that does not follow its format."""


class TruncatedFileError(FormatError):
    """A file that ends before the data its header promises."""


class HeaderSizeError(FormatError):
    """A header length that exceeds the file or the limit of the format."""


class HeaderSyntaxError(FormatError):
    """A header that is not the JSON object the format asks for."""


class DuplicateKeyError(FormatError):
    """A header that names the same tensor twice."""


class UnknownDtypeError(FormatError):
    """A tensor whose dtype is not one of the safetensors format."""


class TensorSizeError(FormatError):
    """A tensor whose byte range does not have the size of its dtype and shape."""


class OffsetRangeError(FormatError):
    """A tensor whose byte range lies outside the file's data."""


class OverlappingTensorsError(FormatError):
    """Two tensors whose byte ranges overlap."""


class UncoveredBytesError(FormatError):
    """Data bytes that belong to no tensor."""


class MissingPartError(FormatError):
    """A compressed tensor one of whose parts is not in the file, or a file that the manifest names and is absent."""


class ManifestError(FormatError):
    """A bitforbit manifest or record that does not follow docs/format.md."""


class UnsupportedVersionError(FormatError):
    """A file of a newer format version, or with a codec that this version does not know."""


class ChecksumError(FormatError):
    """Stored bytes, or bytes decoded from them, that do not have the recorded checksum."""


class CorruptTensorError(FormatError):
    """Compressed data whose tables, counts or codes contradict each other."""


class StateDictError(FormatError):
    """A state dict whose compressed parts do not fit the module, or that lacks what describes them."""


class Df11FormatError(FormatError):
    """A DFloat11 file that does not follow the DF11 layout."""


class Df11LutError(Df11FormatError):
    """DF11 decode tables with loops, dangling pointers or impossible code lengths."""


class Df11PositionsError(Df11FormatError):
    """DF11 output or split positions that are not monotone or do not end at the number of weights."""


class Df11UnrepresentableError(BitforbitError, ValueError):
    """Weights that the DF11 format cannot hold exactly (exponents >= 240)."""


class Df11ShapeError(BitforbitError, ValueError):
    """A DF11 matrix whose shape can be derived neither from its neighbours nor from the config."""


# --- GPUs ----------------------------------------------------------------------------------------------------


class GpuUnavailableError(BitforbitError, RuntimeError):
    """No GPU can be used here: one of the causes below. What runs on the CPU is not touched by it."""


class GpuPackageError(GpuUnavailableError, ImportError):
    """cuda-bindings or NVRTC, the compiler of the kernels, is not installed or cannot be loaded."""


class GpuDriverError(GpuUnavailableError):
    """NVIDIA's driver is missing, too old, or does not start."""


class GpuNotFoundError(GpuUnavailableError):
    """The driver knows no GPU, or not the one that was asked for."""


class GpuArchitectureError(GpuUnavailableError):
    """A GPU that is older than the kernels need, or newer than the installed compiler knows."""


class KernelBuildError(BitforbitError, RuntimeError):
    """A kernel's text that the compiler or the driver does not accept."""


class KernelLaunchError(BitforbitError, RuntimeError):
    """A kernel that could not be enqueued, or a call of the driver that failed."""


# --- models in memory ----------------------------------------------------------------------------------------


class MissingTensorError(BitforbitError, ValueError):
    """A parameter of a model for which no file has a tensor, where it would otherwise hold random numbers."""


class ShapeMismatchError(BitforbitError, ValueError):
    """A stored tensor whose shape is not the one that the model's config asks for."""


# --- what happened on the way --------------------------------------------------------------------------------


class VerificationError(BitforbitError):
    """Restored data that is not the original data."""


class OrderMismatchError(BitforbitError):
    """A product straight from a compressed weight, proven to have torch's bits, had others (``BITFORBIT_PARANOID``)."""


class ResumeError(BitforbitError):
    """An unfinished run that cannot be continued with these arguments."""


class IncompletePartsError(BitforbitError):
    """The parts of a compression were to be merged before all files were there."""


class DiskFullError(BitforbitError, OSError):
    """The destination's file system is full."""
