"""Writes pillow.safetensors: what Pillow makes of two small pictures, and small files in formats that are easily got wrong.

Run: pip install pillow==11.3.0 numpy safetensors && python pillow.py (a second)
Reference: Pillow itself. Evaluation is what torchvision's Resize and CenterCrop do to Pillow pictures, written out below.

rgb [19, 23, 3], rgba [11, 14, 4]: the pictures
resize.FILTER.WIDTHxHEIGHT, resize.rgba.FILTER.WIDTHxHEIGHT: Image.resize
view.SIZE.PERCENT: shorter side to SIZE * 100 / PERCENT, then the square of SIZE in the middle
operation.NAME.MAGNITUDE: ImageOps, ImageEnhance, Image.transform and Image.rotate, nearest neighbours, 128 outside
file.NAME and pixels.NAME: the bytes of a file, and its first frame as RGB or RGBA, upright
"""

import io
import pathlib

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from safetensors.numpy import save_file

rng = np.random.default_rng(3)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
tensors = {}


def keep(name, image):
    tensors[name] = np.ascontiguousarray(np.asarray(image))


def picture(height, width, channels):
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(x / (2 + c) + c) * np.cos(y / (3 + c)) for c in range(channels)]
    noisy = np.stack(waves, -1) + rng.normal(0, 25, (height, width, channels))
    return np.clip(noisy, 20, 250).astype(np.uint8)


def view(image, size, percent):
    target = size * 100 // percent
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(target * long / short)
    image = image.resize((target, long) if width <= height else (long, target), FILTERS["bicubic"])
    width, height = image.size
    top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))
    return image.crop((left, top, left + size, top + size))


rgb = Image.fromarray(picture(19, 23, 3), "RGB")
rgba = picture(11, 14, 4)
rgba[2:4, :, 3] = 0
rgba[5:8, 3:, 3] = 255
rgba = Image.fromarray(rgba, "RGBA")
keep("rgb", rgb)
keep("rgba", rgba)
for name, resampling in FILTERS.items():
    for size in [(8, 8), (23, 40), (5, 19), (31, 7), (1, 1), (46, 38), (22, 20)]:
        keep(f"resize.{name}.{size[0]}x{size[1]}", rgb.resize(size, resampling))
    for size in [(7, 7), (20, 9)]:
        keep(f"resize.rgba.{name}.{size[0]}x{size[1]}", rgba.resize(size, resampling))
for size, percent in [(14, 87), (16, 100), (24, 90)]:
    keep(f"view.{size}.{percent}", view(rgb, size, percent))

affine = dict(method=Image.Transform.AFFINE, resample=Image.Resampling.NEAREST, fillcolor=(128, 128, 128))
for factor in [-0.27, 0.12]:
    keep(f"operation.shear-x.{factor}", rgb.transform(rgb.size, data=(1, factor, 0, 0, 1, 0), **affine))
    keep(f"operation.shear-y.{factor}", rgb.transform(rgb.size, data=(1, 0, 0, factor, 1, 0), **affine))
for pixels in [-4.6, 2.3]:
    keep(f"operation.translate-x.{pixels}", rgb.transform(rgb.size, data=(1, 0, pixels, 0, 1, 0), **affine))
    keep(f"operation.translate-y.{pixels}", rgb.transform(rgb.size, data=(1, 0, 0, 0, 1, pixels), **affine))
for angle in [-27.0, 3.0, 12.5]:
    keep(f"operation.rotate.{angle}", rgb.rotate(angle, Image.Resampling.NEAREST, fillcolor=(128, 128, 128)))
for factor in [0.1, 0.7, 1.0, 1.9]:
    for name, enhance in [("brightness", ImageEnhance.Brightness), ("color", ImageEnhance.Color),
                          ("contrast", ImageEnhance.Contrast), ("sharpness", ImageEnhance.Sharpness)]:
        keep(f"operation.{name}.{factor}", enhance(rgb).enhance(factor))
for bits in [4, 6, 8]:
    keep(f"operation.posterize.{bits}", ImageOps.posterize(rgb, bits))
for threshold in [0, 100, 256]:
    keep(f"operation.solarize.{threshold}", ImageOps.solarize(rgb, threshold))
keep("operation.autocontrast.0", ImageOps.autocontrast(rgb))
keep("operation.equalize.0", ImageOps.equalize(rgb))
# Enough pixels that a step of the histogram is more than one.
keep("large", rgb.resize((64, 48), FILTERS["bicubic"]))
keep("large.equalize", ImageOps.equalize(rgb.resize((64, 48), FILTERS["bicubic"])))


def file(name, image, pixels, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    tensors[f"file.{name}"] = np.frombuffer(stream.getvalue(), np.uint8)
    keep(f"pixels.{name}", pixels)


smooth = rgb.resize((16, 24), FILTERS["bicubic"]).resize((32, 48), FILTERS["bicubic"])
frames = [smooth.quantize(16), smooth.rotate(180).quantize(16)]
cmyk = smooth.convert("CMYK")
file("cmyk", cmyk, cmyk.convert("RGB"), format="JPEG", quality=95)
file("grey", smooth.convert("L"), smooth.convert("L").convert("RGB"), format="PNG")
deep = Image.fromarray((np.arange(48 * 32, dtype=np.uint32) * 42 % 65536).astype(np.uint16).reshape(48, 32))
level = np.round(np.asarray(deep).astype(np.float64) / 257).astype(np.uint8)
file("deep", deep, np.repeat(level[..., None], 3, 2), format="PNG")
file("palette", frames[0], frames[0].convert("RGB"), format="PNG")
file("gif", frames[0], frames[0].convert("RGBA"), format="GIF", save_all=True, append_images=frames[1:])
file("apng", smooth, smooth, format="PNG", save_all=True, append_images=[smooth.rotate(180)])
file("webp", smooth, smooth, format="WEBP", lossless=True, save_all=True, append_images=[smooth.rotate(180)])
file("bmp", smooth, smooth, format="BMP")
for orientation in range(1, 9):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = smooth.resize((16, 24))
    stream = io.BytesIO()
    stored.save(stream, format="PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stream.getvalue())))
    file(f"exif{orientation}", stored, upright, format="PNG", exif=exif)
exif = Image.Exif()
exif[0x0112] = 6
file("turned", smooth, smooth.transpose(Image.Transpose.ROTATE_270), format="JPEG", quality=95, exif=exif)

save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
