// Photographs as the live model takes them, and what it makes of them as canvases.

const LARGEST = 768; // pixels of the longer side; a larger photograph is made smaller
const LARGEST_READ = 16384; // pixels of a side that browsers can draw
const SMALLEST = 16; // pixels that a latent stands for

// A sentence for whoever gave the picture.
export class PictureError extends Error {}

// The picture on a canvas, scaled to at most LARGEST pixels a side, transparency over white.
export function drawn(image) {
  const [width, height] = [image.naturalWidth ?? image.width, image.naturalHeight ?? image.height];
  const size = `The picture has ${width} x ${height} pixels`;
  if (Math.max(width, height) > LARGEST_READ)
    throw new PictureError(`${size}; up to ${LARGEST_READ} on a side can be read.`);
  const scale = Math.min(1, LARGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height].map((side) => Math.round(side * scale));
  if (Math.min(canvas.width, canvas.height) < SMALLEST) {
    const after = scale < 1 ? `, and ${canvas.width} x ${canvas.height} when it is scaled to ${LARGEST}` : "";
    throw new PictureError(
      `${size}${after}; a latent stands for ${SMALLEST} x ${SMALLEST} pixels, so it is too small.`,
    );
  }
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.note = scale < 1 ? `${size} and was scaled to ${canvas.width} x ${canvas.height}.` : "";
  return canvas;
}

// Pixels as [3, height, width] in [0, 1], the border repeated up to multiples of `factor`, as the codec does: the smaller
// half of what is missing comes on top and left.
export function padded(canvas, factor) {
  const size = [canvas.width, canvas.height];
  const [width, height] = size.map((side) => Math.ceil(side / factor) * factor);
  const [left, top] = [Math.floor((width - size[0]) / 2), Math.floor((height - size[1]) / 2)];
  const { data } = canvas.getContext("2d").getImageData(0, 0, ...size);
  const pixels = new Float32Array(3 * height * width);
  const nearest = (i, last) => Math.min(Math.max(i, 0), last - 1);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const from = 4 * (nearest(row - top, size[1]) * size[0] + nearest(column - left, size[0]));
      for (let c = 0; c < 3; c++) pixels[(c * height + row) * width + column] = data[from + c] / 255;
    }
  }
  return { pixels, width, height, inside: [left, top, ...size] };
}

// A canvas of pixels as [3, height, width] in about [0, 1].
export function canvasOf(pixels, width, height) {
  const image = new ImageData(width, height);
  const area = width * height;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(255 * pixels[c * area + i]);
    image.data[4 * i + 3] = 255;
  }
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
