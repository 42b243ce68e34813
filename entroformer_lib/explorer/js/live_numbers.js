// What the live model's numbers are turned into: bits of a latent, its probabilities, ranks.

const BROAD = 50; // a Gaussian this wide is flat over one integer, and its mass a difference of nearly equal numbers

const ERFC = [
  0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368,
  -1.26551223,
];

// Complementary error function, to a relative error of 1.2e-7 (Press et al., Numerical Recipes, section 6.2).
function erfc(x) {
  const z = Math.abs(x);
  const t = 1 / (1 + z / 2);
  let sum = 0;
  for (const term of ERFC) sum = sum * t + term;
  const answer = t * Math.exp(sum - z * z);
  return x >= 0 ? answer : 2 - answer;
}

// Probability of an integer under a Gaussian: its mass over [v - 0.5, v + 0.5].
export function mass(v, mean, scale) {
  const distance = Math.abs(v - mean);
  if (scale > BROAD) return Math.exp(-0.5 * (distance / scale) ** 2) / (scale * Math.sqrt(2 * Math.PI));
  const root = scale * Math.SQRT2;
  return 0.5 * (erfc((distance - 0.5) / root) - erfc((distance + 0.5) / root));
}

// Bits of an integer; nothing is less probable than `floor`.
export const bitsOf = (v, mean, scale, floor) => -Math.log2(Math.max(mass(v, mean, scale), floor));

// The integers around the mean, four sigmas to each side, at most 400, and the actual one among them.
export function probabilities(value, mean, scale) {
  const reach = Math.min(Math.ceil(4 * scale) + 1, 200);
  const first = Math.min(Math.floor(mean) - reach, value);
  const last = Math.max(Math.ceil(mean) + reach, value);
  const kept = last - first > 2000 ? [Math.floor(mean) - reach, Math.ceil(mean) + reach] : [first, last];
  const found = Float32Array.from({ length: kept[1] - kept[0] + 1 }, (_, i) => mass(kept[0] + i, mean, scale));
  return { first: kept[0], probabilities: found };
}

// Ranks from 1; equal values share the mean of theirs.
function ranks(values) {
  const order = Array.from(values.keys()).sort((a, b) => values[a] - values[b]);
  const found = new Float64Array(values.length);
  for (let i = 0; i < order.length;) {
    let j = i;
    while (j < order.length && values[order[j]] === values[order[i]]) j++;
    for (let m = i; m < j; m++) found[order[m]] = (i + j + 1) / 2;
    i = j;
  }
  return found;
}

// Spearman's rank correlation; not a number with fewer than three pairs, or where one side does not vary.
export function rankCorrelation(a, b) {
  if (a.length < 3) return NaN;
  const [x, y] = [ranks(a), ranks(b)];
  const middle = (a.length + 1) / 2;
  let [xy, xx, yy] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    xy += (x[i] - middle) * (y[i] - middle);
    xx += (x[i] - middle) ** 2;
    yy += (y[i] - middle) ** 2;
  }
  return xx && yy ? xy / Math.sqrt(xx * yy) : NaN;
}
