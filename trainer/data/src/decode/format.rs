//! Formats of image files, told by their first bytes and never by their names.

use super::DecodeError;

/// Those that are read, in words. They are those of torchvision's `ImageFolder`.
pub(crate) const FORMATS: &str = "JPEG, PNG, WebP, TIFF, BMP, PPM and PGM";

/// How the names of image files end; in any case.
pub(crate) const IMAGE_NAMES: [&str; 9] = ["jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "ppm", "pgm"];

/// Whether a file name ends like an image that can be decoded.
pub(crate) fn is_image_name(extension: &str) -> bool {
    IMAGE_NAMES.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// The format of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Jpeg,
    Png,
    WebP,
    Tiff,
    Bmp,
    Ppm,
    Pgm,
}

impl Format {
    /// By the first bytes.
    pub(crate) fn of(bytes: &[u8]) -> Result<Self, DecodeError> {
        Ok(match bytes {
            [] => return Err(DecodeError::Empty),
            [0xFF, 0xD8, ..] => Self::Jpeg,
            [0x89, b'P', b'N', b'G', ..] => Self::Png,
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Self::WebP,
            // BigTIFF has 43 for 42.
            [b'I', b'I', 42 | 43, 0, ..] | [b'M', b'M', 0, 42 | 43, ..] => Self::Tiff,
            // Two letters alone begin many texts: behind the sizes stands the length of one of eight headers.
            [b'B', b'M', ..]
                if matches!(bytes.get(14..18), Some([12 | 16 | 40 | 52 | 56 | 64 | 108 | 124, 0, 0, 0])) =>
            {
                Self::Bmp
            }
            [b'P', b'6', b'#' | b' ' | b'\t'..=b'\r', ..] => Self::Ppm,
            [b'P', b'5', b'#' | b' ' | b'\t'..=b'\r', ..] => Self::Pgm,
            [b'P', kind @ b'1'..=b'4', b'#' | b' ' | b'\t'..=b'\r', ..] => {
                let what = format!("text or single bits (P{})", char::from(*kind));
                let instead = "write it as P5 or P6";
                return Err(DecodeError::NotRead { format: "PNM", what, instead });
            }
            _ => {
                let start: Vec<String> = bytes.iter().take(4).map(|b| format!("{b:02x}")).collect();
                return Err(DecodeError::UnknownFormat(start.join(" ")));
            }
        })
    }

    /// How the name of such a file ends.
    pub(crate) fn extension(self) -> &'static str {
        match self {
            Self::Jpeg => "jpg",
            Self::Png => "png",
            Self::WebP => "webp",
            Self::Tiff => "tif",
            Self::Bmp => "bmp",
            Self::Ppm => "ppm",
            Self::Pgm => "pgm",
        }
    }
}
