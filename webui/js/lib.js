// The vendored libraries under short names; the only file that knows their versions.

import { Fragment, h, render } from "../vendor/preact-11.2.0.js";
import {
  useEffect,
  useLayoutEffect,
  useMemo,
  useRef,
  useState,
} from "../vendor/preact-hooks-11.2.0.js";
import { computed, effect, signal } from "../vendor/signals-2.11.4.js";
import htm from "../vendor/htm-3.1.1.js";
import uPlot from "../vendor/uPlot-1.6.32.js";

/** Markup in a template string; every value in it becomes text, never markup. */
export const html = htm.bind(h);

export {
  Fragment,
  computed,
  effect,
  render,
  signal,
  uPlot,
  useEffect,
  useLayoutEffect,
  useMemo,
  useRef,
  useState,
};
